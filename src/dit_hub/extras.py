"""Other packages: the optional ones, which are imported where they are used, and what all of them print."""

import importlib
import json
import os
import warnings
from importlib import metadata
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname


def require(module: str, extra: str) -> Any:
    """Import an optional package.

    Args:
        module: its import name.
        extra: the extra of dit-hub that installs it.

    Raises:
        ImportError: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise ImportError(f"This needs {module}, which is not installed: {install_command(extra)}.") from None


def install_command(extra: str) -> str:
    """What installs an extra where this dit-hub comes from: a clone, a repository, a wheel or an index."""
    try:
        source = json.loads(metadata.distribution("dit-hub").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        source = {}
    if "dir_info" in source:
        folder = url2pathname(urlsplit(source["url"]).path)
        return f'pip install {"-e " if source["dir_info"].get("editable") else ""}"{folder}[{extra}]"'
    return f'pip install "dit-hub[{extra}]{_address(source)}"'


def _address(source: dict[str, Any]) -> str:
    """Of what pip noted beside the package (PEP 610), in a requirement; "" where it comes from an index."""
    if "vcs_info" in source:
        return f" @ {source['vcs_info']['vcs']}+{source['url']}@{source['vcs_info']['commit_id']}"
    return f" @ {source['url']}" if source else ""


def quiet_libraries() -> None:
    """Silence bars and advice of transformers, diffusers and huggingface_hub in programs that have their own to say."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # each attempt to reach a Hub that cannot be reached
    # diffusers says it with each model that it looks for on the Hub.
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument")
    for library in ("transformers", "diffusers"):
        importlib.import_module(f"{library}.utils.logging").disable_progress_bar()
