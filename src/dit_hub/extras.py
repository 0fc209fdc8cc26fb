"""Optional packages, which are imported where they are used, and quiet libraries."""

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
    """The pip command for an extra, from the source of this dit-hub: a clone, a repository, a wheel or an index."""
    try:
        source = json.loads(metadata.distribution("dit-hub").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        source = {}
    if "dir_info" in source:
        folder = url2pathname(urlsplit(source["url"]).path)
        return f'pip install {"-e " if source["dir_info"].get("editable") else ""}"{folder}[{extra}]"'
    return f'pip install "dit-hub[{extra}]{_address(source)}"'


def _address(source: dict[str, Any]) -> str:
    """The address in a requirement, from pip's record of the source (PEP 610); "" for an index."""
    if "vcs_info" in source:
        return f" @ {source['vcs_info']['vcs']}+{source['url']}@{source['vcs_info']['commit_id']}"
    return f" @ {source['url']}" if source else ""


def quiet_libraries() -> None:
    """Silence the progress bars and advice of transformers, diffusers and huggingface_hub."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it warns of every retry
    # diffusers causes it for each model that it looks up on the Hub.
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument")
    for library in ("transformers", "diffusers"):
        importlib.import_module(f"{library}.utils.logging").disable_progress_bar()
