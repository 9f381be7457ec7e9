"""`meswitch push` and `meswitch pull`: artifacts in repositories of the Hugging Face hub."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meswitch.cli import console
from meswitch.cli.options import option_groups
from meswitch.errors import ConfigError
from meswitch.units import format_bytes

if TYPE_CHECKING:
    from meswitch.artifact.remote import RemoteName

_CARD = "Model card"
RepositoryArgument = Annotated[
    str, typer.Argument(metavar="ORG/NAME", help="The repository; `@REVISION` behind it names a branch, tag or commit.")
]


@dataclass(frozen=True, slots=True)
class Card:
    """What the model card says that the artifact does not know."""

    base: Annotated[
        str | None,
        typer.Option(
            metavar="HUB_ID", rich_help_panel=_CARD, help="The base on the hub. Left out: as in the artifact's recipe."
        ),
    ] = None
    expert: Annotated[
        str | None,
        typer.Option(metavar="HUB_ID", rich_help_panel=_CARD, help="The fine-tune on the hub, likewise."),
    ] = None
    quality: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", rich_help_panel=_CARD, help="What `meswitch eval --out FILE.json` measured."),
    ] = None
    license: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            rich_help_panel=_CARD,
            help="The hub's identifier of the licence, such as apache-2.0 or llama3.1; `other` with the two below.",
        ),
    ] = None
    license_name: Annotated[
        str | None, typer.Option(metavar="NAME", rich_help_panel=_CARD, help="With --license other.")
    ] = None
    license_link: Annotated[
        str | None, typer.Option(metavar="URL", rich_help_panel=_CARD, help="With --license other.")
    ] = None
    language: Annotated[
        list[str] | None, typer.Option(metavar="CODE", rich_help_panel=_CARD, help="Such as en; repeatable.")
    ] = None


@option_groups
def push_command(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="What `meswitch compress` wrote.")],
    repository: RepositoryArgument,
    card: Card = Card(),
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Who may see a repository that is created. Default: the account's setting."
        ),
    ] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="The message of the commit.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the artifact, print the model card and end; nothing is sent.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Upload an artifact to the Hugging Face hub, with a model card that is generated.

    Every byte is checked first. The card has base, bytes, bits per weight, method, quality if you measured it, licence
    and how to serve it. A card that somebody wrote in the repository stays. The repository is created if it is not
    there. Log in with `hf auth login`, or set HF_TOKEN.

    Examples:

        meswitch push deltas/math me/math-delta --base mistralai/Mistral-7B-v0.1 --license apache-2.0
        meswitch push deltas/math me/math-delta --quality eval.json --private
        meswitch push deltas/math me/math-delta --dry-run > README.md
    """
    console.quiet()
    from meswitch.artifact import Artifact
    from meswitch.artifact.remote import About, model_card, read_quality
    from meswitch.artifact.remote import push as run

    name = _repository(repository)
    if (card.license_name or card.license_link) and card.license != "other":
        raise ConfigError("--license-name, --license-link: are for `--license other`; the hub knows the other licences")
    if card.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", card.license):
        raise ConfigError(f"--license {card.license}: an identifier such as apache-2.0, or `other` with --license-name")
    about = About(
        name.repository, card.base, card.expert, card.license, card.license_name, card.license_link,
        tuple(card.language or ()), None if card.quality is None else read_quality(card.quality),
    )  # fmt: skip
    opened = Artifact.open(artifact)
    with console.progress("verify") as progress:
        opened.verify(progress)
    text = model_card(opened, about)
    if about.base is None and (opened.manifest.recipe is None or opened.manifest.recipe.base is None):
        console.note("the card says BASE where the base's hub id belongs; give it with --base ORG/NAME")
    if dry_run:
        if as_json:
            console.print_json({"repository": name.repository, "card": text, "pushed": None})
        else:
            typer.echo(text, nl=False)
        return
    done = run(opened, name, text, private=private, message=message, notice=console.note)
    if as_json:
        console.print_json({"repository": name.repository, "pushed": asdict(done)})
        return
    typer.echo(f"{done.url}: {len(done.files)} files, {format_bytes(opened.disk_bytes)}")
    if done.removed:
        typer.echo(f"removed, of an earlier artifact: {', '.join(done.removed)}")
    if done.kept_card:
        typer.echo("the repository's own README.md stays; --dry-run prints the generated one")


def pull_command(
    repository: RepositoryArgument,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The directory to create.", show_default="the repository's name")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an artifact that exists. Other directories are never touched.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a line.")] = False,
) -> None:
    """Fetch an artifact from the Hugging Face hub into a directory, and check every byte of it.

    Only what its manifest lists is fetched, and its README.md. Without this step, commands and family.toml take
    `hf://ORG/NAME` where they take an artifact's directory; it is then kept in the Hugging Face cache.

    Example:

        meswitch pull me/math-delta --out deltas/math
    """
    console.quiet()
    from meswitch.artifact.remote import pull as run

    name = _repository(repository)
    target = out or Path(name.repository.rpartition("/")[2])
    console.note(f"fetching {name}")
    with console.progress("verify") as progress:
        artifact, commit = run(name, target, overwrite=overwrite, progress=progress)
    found = {"artifact": str(target), "repository": name.repository, "commit": commit, "bytes": artifact.disk_bytes}
    if as_json:
        console.print_json(found | {"expert": artifact.manifest.expert.name, "base": artifact.manifest.base.name})
    else:
        typer.echo(f"{target}: {artifact.manifest.expert.name}, {format_bytes(artifact.disk_bytes)}, commit {commit}")


def _repository(text: str) -> "RemoteName":
    """`org/name[@revision]`, with `hf://` before it or not."""
    from meswitch.artifact.remote import remote_name

    found = remote_name(text if text.startswith("hf:/") else f"hf://{text}")
    assert found is not None
    return found
