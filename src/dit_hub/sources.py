"""Where a named model is: in a folder, in the package, or on the Hub, whose errors become one sentence."""

import contextlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dit_hub.conversion.origin import ORIGIN_FILE

# The models that come with the package, found by name without a network.
EMBEDDED_MODELS = {"dit-toy-shapes": Path(__file__).parent / "assets" / "dit-toy-shapes"}

CARD_FILE = "README.md"

# Suffixes of files that hold weights.
_WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".onnx", ".json")


def is_url(source: str | os.PathLike) -> bool:
    """Whether a source is a web address."""
    return str(source).startswith(("https://", "http://"))


def local_folder(name: str | os.PathLike) -> Path | None:
    """The folder that a name stands for: one of that path, else an embedded model's. None for a Hub id.

    Raises:
        ValueError: it is none of these.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ValueError(_not_a_folder(folder))
    if str(name) in EMBEDDED_MODELS:
        return EMBEDDED_MODELS[str(name)]
    if folder.suffix in _WEIGHTS:
        raise ValueError(f"There is no file {name}.")
    if isinstance(name, os.PathLike) or _is_path(name):
        raise ValueError(f"There is no folder {name}.")
    if name.count("/") == 1:  # "organisation/name"
        return None
    raise ValueError(f"There is no folder and no embedded model {str(name)!r}; embedded: {', '.join(EMBEDDED_MODELS)}. "
                     "A model on the Hub is named ORGANISATION/NAME.")  # fmt: skip


def _is_path(name: str) -> bool:
    """Whether a name can only be a path: no Hub id starts with a dot or ends with a slash."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or ".." in name or "\\" in name or name.count("/") > 1


def _not_a_folder(file: Path) -> str:
    """The message for a file in place of a pipeline folder, with what to do."""
    around = next((folder for folder in file.parents[:2] if (folder / "model_index.json").is_file()), None)
    if file.suffix == ".onnx":
        run = f"give {around}, the folder it is a part of" if around else "give the folder of its pipeline"
        return (
            f"{file} is a file for ONNX Runtime already: {run}, to sample with it; `dit-hub export tensorrt` takes it "
            "as it is, and other exports start from the model it was made from."
        )
    if around:
        return f"{file} is a part of the pipeline {around}; give that folder."
    return f"{file} is a file; load it with DiTPipeline.from_single_file or `dit-hub convert`."


def fetch_url(url: str, hub_options: dict[str, Any]) -> str:
    """The cached path of a file on the Hub, or on the mirror that HF_ENDPOINT names.

    Args:
        url: "https://huggingface.co/ORG/NAME/resolve/REVISION/FILE".
        hub_options: of huggingface_hub's downloads; a revision there replaces that of the address.
    """
    found = re.fullmatch(r"(https?://[^/]+)/([^/]+/[^/]+)/(?:resolve|blob)/([^/]+)/(.+?)(?:\?.*)?", url)
    if not found or found[1] not in ("https://huggingface.co", "https://hf.co", ENDPOINT):
        raise ValueError(
            f"{url} is no address of a file on the Hub: https://huggingface.co/ORG/NAME/resolve/main/FILE."
        )
    _, repository, revision, name = found.groups()
    hub_options = {"revision": revision, **hub_options}
    for fact in (ORIGIN_FILE, CARD_FILE):  # files beside it that may name its licence
        with contextlib.suppress(OSError):
            fetch(repository, str(PurePosixPath(name).with_name(fact)), hub_options)
    return fetch(repository, name, hub_options)


def fetch(repository: str, name: str, hub_options: dict[str, Any], aside: str = "") -> str:
    """The cached path of a file of a repository; the Hub's errors become one sentence, with the caller's aside."""
    with plain_hub_errors(f"load {repository}{aside} from", name, hub_options.get("revision")):
        return hf_hub_download(repository, name, **hub_options)


@contextmanager
def plain_hub_errors(action: str, name: str = "such file", revision: str | None = None) -> Iterator[None]:
    """Turn the Hub's errors into one sentence, without tokens and without addresses that could hold one."""
    try:
        yield
    except GatedRepoError as error:
        problem, cause = "it is gated; ask for access on its page and log in", error
    except RepositoryNotFoundError as error:
        problem, cause = "there is no such repository, or the token does not open it", error
    except RevisionNotFoundError as error:
        problem, cause = f"it has no revision {revision}", error
    except LocalEntryNotFoundError as error:  # before its parent, EntryNotFoundError
        problem, cause = "it cannot be reached, and the files are not in the cache", error
    except OfflineModeIsEnabled as error:
        problem, cause = "HF_HUB_OFFLINE is set", error
    except EntryNotFoundError as error:
        problem, cause = f"it has no {name}", error
    except LocalTokenNotFoundError as error:
        problem, cause = "no token; run `hf auth login` or set HF_TOKEN", error
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = {401: ", the token is missing or wrong", 403: ", the token may not write there"}.get(status, "")
        problem, cause = f"it answers with status {status}{advice}", error
    except HTTPError as error:
        problem, cause = (
            f"the connection broke ({type(error).__name__}); what has arrived need not be sent again",
            error,
        )
    else:
        return
    raise OSError(f"Cannot {action} the Hub: {problem}.") from cause
