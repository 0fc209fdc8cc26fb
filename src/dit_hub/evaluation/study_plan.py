"""The plan of a study: which models, how they are trained, sampled and scored. One short YAML file."""

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ..checks import real_number, whole_number
from ..configuration_dit import DiTConfig, nearest
from ..schedulers import SCHEDULERS
from ..training.recipe import Recipe, get_recipe
from .estimates import GROUPS, METRICS

# Data that come with the package, or with scikit-learn, and have an extractor of their own.
_BUILT_IN = ("shapes", "digits")

# All checkpoints of a run are kept until they are scored.
_KEEP_ALL = 1_000_000


@dataclass(frozen=True)
class PlannedCell:
    """A model of a study that is to be trained, or that has been.

    Args:
        name: such as "DiT-S/2".
        size: of the model without its patch: "DiT-S".
        patch: side of a patch; 0 where the trained model says it.
        recipe: how to train it; None where it is trained.
        folder: the pipeline of a trained model; "" where it is to be trained.
    """

    name: str
    size: str
    patch: int
    recipe: Recipe | None = None
    folder: str = ""

    @property
    def folder_name(self) -> str:
        return self.name.replace("/", "-")


@dataclass(frozen=True)
class Plan:
    """A study: the models of `sizes` and `patches`, or `models`, one recipe, and how they are scored.

    Args:
        title: of the study's page.
        recipe: a shipped recipe by name, or a YAML file.
        settings: changes to the recipe, by field.
        sizes: sizes of the paper ("DiT-S", or "DiT-S/2" with a patch of its own), or names with fields of `DiTConfig`
            that replace those of the recipe's model.
        patches: sides of the patches with which each size is trained.
        models: folders or Hub ids of trained pipelines, by name.
        every: steps between scores in training; 0 for the finished model only.
        samples: images drawn of each model.
        sampling: arguments of `sample_images`, and `scheduler` for another than the model's.
        reference: what samples are compared with, as for `evaluate`; "" for the recipe's data, if they are built in.
        metrics: ids of `evaluate`; the first, of which lower is better, ranks the models.
        extractor: as for `evaluate`; "" for that of built-in data, else "inception".
    """

    title: str = "A scaling study"
    recipe: str = "toy-shapes"
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: Any = ()
    patches: Any = ()
    models: dict[str, str] = field(default_factory=dict)
    every: int = 0
    samples: int = 2000
    sampling: dict[str, Any] = field(default_factory=dict)
    reference: str = ""
    metrics: Any = ("fid",)
    extractor: str = ""

    def __post_init__(self) -> None:
        for name in ("settings", "models", "sampling"):
            _check_type(name, getattr(self, name), dict, "names with values")
        for name in ("title", "recipe", "reference", "extractor"):
            _check_type(name, getattr(self, name), str, "text")
        _check_type("sizes", self.sizes, (dict, list, tuple), "names, or names with fields of a configuration")
        _check_type("patches", self.patches, (list, tuple), "a list of whole numbers")
        for patch in self.patches:
            whole_number("patches", patch, 1)
        whole_number("every", self.every, 0)
        whole_number("samples", self.samples, 2 * GROUPS)  # fewer tell no interval
        _check_type("metrics", self.metrics, (list, tuple), "a list of names")
        if not self.metrics:
            raise ValueError("metrics must name at least one metric, such as fid.")
        if unknown := [str(name) for name in self.metrics if name not in METRICS]:
            raise ValueError(
                f"There is no metric {unknown[0]!r}. The nearest names: {nearest(unknown[0], [*METRICS])}."
            )
        if not METRICS[self.metric].lower_is_better:
            raise ValueError(f"metrics begins with {self.metric!r}, by which higher is better; put one first that "
                             "falls as models get better, such as fid.")  # fmt: skip
        if not self.sizes and not self.models:
            raise ValueError("A plan needs sizes with patches, or models that are trained.")

    @property
    def metric(self) -> str:
        """The metric that ranks the models."""
        return self.metrics[0]

    @property
    def references(self) -> tuple[str, str]:
        """What samples are compared with, and the extractor that sees them."""
        data = get_recipe(self.recipe).with_settings(self.settings).data
        if not self.reference and data not in _BUILT_IN:
            raise ValueError(f"A plan for the data {data!r} needs a reference: an archive of images or statistics.")
        reference = self.reference or data
        return reference, self.extractor or (reference if reference in _BUILT_IN else "inception")

    def cells(self) -> list[PlannedCell]:
        """The models of the study.

        Raises:
            ValueError: an unknown recipe, size or field, a patch that does not divide the input, two equal names.
        """
        trained = [PlannedCell(name, name, 0, folder=str(folder)) for name, folder in self.models.items()]
        cells = [*self._cells_to_train(), *trained] if self.sizes else trained
        names = [cell.folder_name for cell in cells]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"Two models of the plan are named {twice}; give each a name of its own.")
        return cells

    def _cells_to_train(self) -> list[PlannedCell]:
        recipe = get_recipe(self.recipe).with_settings(self.settings)
        if recipe.init_from:
            raise ValueError("A study trains its models anew, and the recipe has init_from; remove it.")
        kept = {"save_every": self.every, "keep_last": _KEEP_ALL} if self.every else {}
        recipe = replace(recipe, tracker="none", push_to_hub="", sample_every=0, **kept)
        named = self.sizes.items() if isinstance(self.sizes, dict) else [(size, None) for size in self.sizes]
        cells = []
        for size, own in named:
            _check_type("A size", size, str, "a name")
            name, slash, patch = size.partition("/")
            if not slash and not self.patches:
                raise ValueError(f"The size {size} needs patches, or one of its own: {size}/2.")
            for side in [_own_patch(size, patch)] if slash else self.patches:
                cells.append(_cell_to_train(recipe, name, side, own))
        return cells

    def check(self) -> None:
        """Raise ValueError as `cells` and `references` do, and where `sampling` has something unknown."""
        from .sampling import sample_images

        _ = self.cells(), self.references
        check_sampling(self.sampling, sample_images)

    def facts(self) -> dict[str, Any]:
        """What a finished cell depends on but for its recipe, for JSON."""
        reference, extractor = self.references
        return {"every": self.every, "samples": self.samples, "sampling": self.sampling, "reference": reference,
                "metrics": list(self.metrics), "extractor": extractor}  # fmt: skip


def _own_patch(size: str, patch: str) -> int:
    if not patch.isdecimal() or not int(patch):
        raise ValueError(f"The size {size!r} has no number after its slash.")
    return int(patch)


def _cell_to_train(recipe: Recipe, size: str, patch: int, own: Any) -> PlannedCell:
    name = f"{size}/{patch}"
    if own is None:
        model: Any = name
    else:
        _check_type(f"The size {size}", own, dict, "fields of a configuration")
        model = {**_model_fields(recipe), **own, "patch_size": patch}
    try:
        recipe = replace(recipe, model=model)
        _ = recipe.config
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return PlannedCell(name, size, patch, recipe)


def _model_fields(recipe: Recipe) -> dict[str, Any]:
    """Fields of the recipe's model; without its classes, which are the data's unless the recipe names them."""
    if isinstance(recipe.model, dict):
        return recipe.model
    config = recipe.config
    return {name: getattr(config, name) for name in DiTConfig.__annotations__ if name != "num_classes"}


def read_plan(file: str) -> Plan:
    """The plan in a YAML file.

    Raises:
        ValueError: there is no such file, or it is no plan.
    """
    if not Path(file).is_file():
        raise ValueError(f"There is no file {file}.")
    try:
        read = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML: {str(error).splitlines()[0]}.") from None
    if not isinstance(read, dict):
        raise ValueError(f"{file} must hold fields of a plan, not {type(read).__name__}.")
    known = [item.name for item in fields(Plan)]
    if unknown := [str(name) for name in read if name not in known]:
        raise ValueError(f"A plan has no field {unknown[0]!r}. The nearest names: {nearest(unknown[0], known)}.")
    try:
        return Plan(**read)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def check_sampling(sampling: dict[str, Any], sample: Callable[..., Any]) -> None:
    """Raise ValueError if `sampling` holds something that the function to sample with does not take."""
    own = ("pipeline", "out", "num", "progress")
    known = [name for name in inspect.signature(sample).parameters if name not in own] + ["scheduler"]
    if unknown := [str(name) for name in sampling if name not in known]:
        raise ValueError(f"sampling has no field {unknown[0]!r}. The nearest names: {nearest(unknown[0], known)}.")
    if (name := sampling.get("scheduler", "ddpm")) not in SCHEDULERS:
        raise ValueError(f"There is no scheduler named {name!r}; known: {', '.join(SCHEDULERS)}.")
    for setting in ("num_inference_steps", "batch_size"):
        if sampling.get(setting) is not None:
            whole_number(setting, sampling[setting], 1)
    if sampling.get("guidance_scale") is not None:
        real_number("guidance_scale", sampling["guidance_scale"])


def _check_type(name: str, value: Any, kind: Any, what: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {what}, not {value!r}.")


def recipe_facts(cell: PlannedCell) -> dict[str, Any]:
    """How a cell is trained, or where it is, for JSON."""
    if cell.recipe is None:
        return {"folder": cell.folder}
    # How often a run is saved does not change its result.
    return {name: value for name, value in asdict(cell.recipe).items() if name not in ("save_every", "keep_last")}
