"""A policy to the Hugging Face hub: weights, tokenizer and model card.

    ldalign push FOLDER OWNER/NAME [private=false]

FOLDER is a model folder, or a run, of which the result is taken (selected.json). The repository is
made where it is not there, private unless private=false says otherwise. The token is HF_TOKEN's,
or that of `hf auth login`. What the hub has already is not sent again. A run does the same at its
end with hub.push=OWNER/NAME.
"""

from collections.abc import Sequence
from pathlib import Path

from ldalign.models.weights import check_model
from ldalign.run.context import find_model
from ldalign.run.manifest import MODEL_FILES
from ldalign.run.settings import RunConfig
from ldalign.run.stages.policy import POLICY_STAGE
from ldalign.system import exits, hub
from ldalign.system.distributed import on_rank0
from ldalign.system.errors import InputError
from ldalign.system.metrics import say

MORE = ("README.md", "LICENSE*", "added_tokens.json", "additional_chat_templates/*.jinja")
PRIVATE = {"private=true": True, "private=false": False}


def main(argv: list[str]) -> None:
    """Reads what is to be pushed and whereto, and pushes it."""
    if {"-h", "--help"} & set(argv):
        print((__doc__ or "").strip())
        return
    given = [PRIVATE[argument] for argument in argv if argument in PRIVATE]
    places = [argument for argument in argv if argument not in PRIVATE]
    if len(places) != 2 or len(given) > 1 or any(place.startswith("-") for place in places):
        raise InputError(f"{' '.join(argv) or 'push'}: give FOLDER OWNER/NAME [private=false]")
    name, repo = places
    if not hub.is_repository(repo):
        raise InputError(f"{repo}: no repository of the hub is called that; give OWNER/NAME")
    folder = find_model(RunConfig(), name)
    check_model(folder)
    private = given[0] if given else True
    hub.check_push(repo, private, make=True)
    push(folder, repo, private)


def push(folder: Path, repo: str, private: bool) -> None:
    """Pushes a policy's folder, on rank 0, and says where it is. All ranks may call it.

    Raises EnvironmentProblem as `hub.push` does.
    """
    files = sorted(
        {
            path.relative_to(folder).as_posix()
            for pattern in (*MODEL_FILES, *MORE)
            for path in folder.glob(pattern)
            if path.is_file()
        }
    )
    address = on_rank0(lambda: hub.push(folder, files, repo, private, "Policy trained by ldalign"))
    say(f"pushed {len(files)} files: {address}")


def check_run_pushes(config: RunConfig, planned: Sequence[str], make: bool) -> None:
    """Makes sure, before any work, that the policy of a run can be pushed where hub.push says.

    planned: the run's stages. make: the repository may be made. Raises InputError where the run
    trains no policy that could be its result, and as `ldalign.system.hub.check_push` does.
    """
    repo, private = config.hub.push, config.hub.private
    if repo is None:
        return
    results = [name for name in planned if name.rpartition("/")[2] == POLICY_STAGE.name]
    if not [name for name in results if not name.startswith("continual_sft/")]:
        raise InputError(f"hub.push={repo}: no policy is trained; leave it out")
    on_rank0(lambda: hub.check_push(repo, private, make))


if __name__ == "__main__":
    exits.run(main)
