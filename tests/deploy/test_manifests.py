"""The manifest for KubeRay: Ray's own schema reads its application, Kubernetes' its pods."""

from pathlib import Path

import pytest

pytest.importorskip("ray", reason="make test-ray")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="make test-ray")
yaml = pytest.importorskip("yaml", reason="make test-ray")

MANIFEST = Path(__file__).parents[2] / "examples" / "kubernetes" / "rayservice.yaml"


@pytest.fixture(scope="module")
def spec():
    found = yaml.safe_load(MANIFEST.read_text())
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", "RayService")
    return found["spec"]


def pods(spec):
    cluster = spec["rayClusterConfig"]
    return {"head": cluster["headGroupSpec"], **{group["groupName"]: group for group in cluster["workerGroupSpecs"]}}


def check(template) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_the_application_is_one_that_ray_serve_takes(spec):
    from ray.serve.schema import ServeDeploySchema

    from meswitch.deploy import ray_app

    config = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert (module, getattr(ray_app, name)) == ("meswitch.deploy.ray_app", ray_app.build)
    arguments = ray_app.Arguments.model_validate(application.args)
    assert arguments.replicas == pods(spec)["gpu"]["replicas"]


def test_the_pods_are_pods_of_kubernetes(spec):
    for group in pods(spec).values():
        check(group["template"])


def test_a_typing_error_would_be_seen(spec):
    template = pods(spec)["gpu"]["template"]
    container = {**template["spec"]["containers"][0], "volumeMount": []}
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
        check({"spec": {**template["spec"], "containers": [container]}})


def test_cluster_and_environment_are_of_the_same_ray(spec):
    import ray

    assert spec["rayClusterConfig"]["rayVersion"] == ray.__version__
