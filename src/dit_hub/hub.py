"""HubPipeline: what goes out of a pipeline: saving, and pushing with a card."""

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from huggingface_hub import CommitOperationAdd, HfApi

from dit_hub.model_cards import is_own_card, render_card

from .loading import LoadingPipeline, weights_state
from .sources import CARD_FILE, plain_hub_errors
from .visualize import draw_samples


class HubPipeline(LoadingPipeline):
    """A `DiffusionPipeline` that loads every layout of a DiT and pushes with a card; `DiTPipeline` samples."""

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As diffusers' `save_pretrained`, with the facts about the weights beside them.

        Raises:
            ValueError: a component that cannot be saved, which diffusers would leave out; nothing is written.
        """
        stock: Any = super()  # of whose components each has a folder
        for name, component in stock.components.items():
            _check_saveable(name, getattr(component, "_orig_mod", component))  # itself, where it is compiled
        super().save_pretrained(save_directory, **kwargs)
        self.save_facts(save_directory)

    def save_facts(self, folder: str | os.PathLike) -> None:
        """Write what is known of the weights into a folder that they were written to.

        The licence stays whatever happened to the weights; what was measured goes only with weights that are as loaded.
        """
        unchanged = self._loaded_weights == weights_state(self.transformer)
        if self.origin is not None:
            checked_here = unchanged and self.origin.conversion.get("to") == "dit-hub"
            origin = replace(self.origin, modified=self.origin.modified or not unchanged)
            (origin if checked_here else replace(origin, conversion={})).save(Path(folder))
        for name, text in self._facts.items() if unchanged else ():
            Path(folder, name).write_text(text)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        variant: str | None = None,
        max_shard_size: int | str = "5GB",
        **kwargs: Any,
    ) -> str:
        """Push the pipeline with its card to the Hub; the repository is made where it does not exist.

        Args:
            repo_id: "organisation/name", or a name of your own.
            commit_message: of the one commit that holds everything.
            private: whether a new repository is.
            token: of the Hub; None means the one you logged in with.
            create_pr: propose the files instead of committing them.
            variant, max_shard_size: as for `save_pretrained`.
            kwargs: further arguments of `save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            OSError: the Hub refuses, or cannot be reached. Files it has received need not be sent again.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size, **kwargs)
            draw_samples(self, folder)
            return push_folder(folder, repo_id, commit_message, private, token, create_pr)


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
) -> str:
    """Push a folder to the Hub in one commit; arguments, result and errors as for `DiTPipeline.push_to_hub`.

    A README.md that a person wrote is pushed as it is; one that `write_card` made is made anew for the repository.
    """
    api, folder = HfApi(token=token), Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_hidden(path, folder)]
    additions = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    ours = not (folder / CARD_FILE).is_file() or is_own_card(folder / CARD_FILE)
    if ours:
        render_card(folder, repo_id)  # what cannot be described is refused before a repository is made for it
    repository = make_repository(repo_id, private, token)
    with plain_hub_errors(f"push to {repo_id} on"):
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        if ours:
            card = CommitOperationAdd(CARD_FILE, str(render_card(folder, repository)).encode())
            additions = [card, *(addition for addition in additions if addition.path_in_repo != CARD_FILE)]
        message = commit_message or f"Upload {folder.name if folder.name else 'pipeline'}"
        commit = api.create_commit(
            repository, additions, commit_message=message, create_pr=create_pr, revision=revision
        )
        return commit.commit_url


def make_repository(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Make a repository on the Hub, unless it is there; returns its whole name. Errors as for `push_folder`."""
    with plain_hub_errors(f"push to {repo_id} on"):
        return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _check_saveable(name: str, component: Any) -> None:
    """ValueError for a component that diffusers would leave out of a folder, or write only a part of."""
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")  # without it nothing holds adapters
    modules = component.modules() if isinstance(component, torch.nn.Module) and tuners else ()
    if any(isinstance(module, tuners.BaseTunerLayer) for module in modules):
        whole = hasattr(component, "merge_and_unload")
        merge = (
            f"pipe.{name} = pipe.{name}.merge_and_unload()" if whole else "pipe.fuse_lora(); pipe.unload_lora_weights()"
        )
        raise ValueError(
            f"The {name} holds adapters, which a pipeline folder has no place for, so nothing was written; add them to "
            f"its weights first: {merge}."
        )
    config: Any = getattr(component, "config", None)
    torchao = type(getattr(config, "quantization_config", None)).__name__ == "TorchAoConfig"
    if torchao and getattr(config, "pos_embed", None) == "learned":
        raise ValueError(
            f"torchao's files of the {name} would not load, since it has learned positions; nothing was written. Save "
            "it as it was before it was quantised."
        )
    bases = (
        getattr(sys.modules[library], base, None)
        for library, classes in LOADABLE_CLASSES.items()
        if library in sys.modules
        for base in classes
    )
    if component is not None and not any(isinstance(component, base) for base in bases if base is not None):
        kind = type(component).__name__
        raise ValueError(f"The {name} is a {kind}, which diffusers cannot save, so nothing was written.")
