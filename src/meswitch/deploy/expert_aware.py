"""Ray Serve's question "which replica?", answered by `placement.ranked`."""

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from meswitch.deploy.placement import ranked


class ExpertAware(FIFOMixin, RequestRouter):
    """Requests go to a replica that holds their expert, if it has room.

    The expert is a request's `multiplexed_model_id`; what is resident is what `Replica.record_routing_stats` says.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        resident = {name: replica.routing_stats.get("resident", ()) for name, replica in by_id.items()}
        expert = pending_request.metadata.multiplexed_model_id if pending_request is not None else ""
        return [[by_id[name] for name in group] for group in ranked(resident, expert)]
