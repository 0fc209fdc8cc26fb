"""Pipelines to and from a Hub, over HTTP, with the unmodified client.

The client reads its settings when it is imported, so each person is a process of their own, and those of one hub are
forked from one whose client has read them: the cache is named relative to where a person is.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from huggingface_hub import ModelCard

from dit_hub import DiTPipeline, DiTTransformer
from dit_hub.conversion import Origin, diffusers_config, to_diffusers
from dit_hub.conversion.pipelines import convert
from dit_hub.export import export_onnx
from local_hub import TOKEN, LocalHub, Repository, local_hub

from .command_line import Server, python
from .conftest import load_golden, small_vae

SAMPLE = """
import json, sys, hashlib, torch
def digest(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe([1, 2], num_inference_steps=3, generator=generator, output_type="np", **options)
    return hashlib.sha256((images.images * 255).round().astype("uint8").tobytes()).hexdigest()
def weights(pipe):
    tensors = [*pipe.transformer.state_dict().values(), *pipe.vae.state_dict().values()]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()
def attempt(function):
    try:
        return function()
    except OSError as error:
        return "OSError: " + str(error)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    with local_hub() as running:
        yield running


def person(hub: LocalHub, home: Path, script: str, token: str | None = None, **environment: str) -> dict[str, Any]:
    """Run a script as somebody with a cache of their own; it prints a JSON object last."""
    run = as_person(hub, home, [sys.executable, "-c", SAMPLE + script], token, **environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def settings_of(endpoint: str) -> dict[str, str]:
    """What everybody's client reads."""
    names = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY")
    return {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | dict(
        zip(names, (endpoint, ".", "1", "1"), strict=True)
    )


@functools.cache
def server_of(endpoint: str) -> Server:
    """What forks the persons of a hub."""
    return Server(settings_of(endpoint))


def as_person(
    hub: LocalHub, home: Path, command: list[str], token: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command as somebody with a cache of their own; whatever happens, it must not print the token."""
    settings = {**settings_of(hub.endpoint), "HF_HOME": str(home), **environment}
    if token:
        settings["HF_TOKEN"] = token
    if environment:  # which the client must see when it is imported
        run = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    else:
        home.mkdir(parents=True, exist_ok=True)
        run = python(*command[1:], cwd=home, environment=settings, server=server_of(hub.endpoint))
    assert TOKEN not in run.stdout + run.stderr
    assert (token or TOKEN) not in run.stdout + run.stderr
    return run


def dit_hub(
    hub: LocalHub, home: Path, *arguments: object, token: str | None = TOKEN
) -> subprocess.CompletedProcess[str]:
    """Run the command line as somebody."""
    return as_person(hub, home, [sys.executable, "-m", "dit_hub.cli", *map(str, arguments)], token)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pipelines of this module lie before they are pushed."""
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture
def pushed(
    hub: LocalHub,
    folder: Path,
    tmp_path: Path,
    make_model: Callable[..., DiTTransformer],
    make_vae: Callable[..., Any],
) -> dict[str, Any]:
    """A private repository of a latent pipeline with two revisions and a half-precision variant; and an ONNX one."""
    if (folder / "digests.json").exists():
        return json.loads((folder / "digests.json").read_text())
    for seed in (0, 1):
        pipeline = DiTPipeline(make_model(seed=seed, num_classes=1000), DDIMScheduler(clip_sample=False), make_vae())
        pipeline.save_pretrained(folder / str(seed))
    DiTPipeline.from_pretrained(folder / "1", dtype=torch.float16).save_pretrained(folder / "1", variant="fp16")
    export_onnx(folder / "1", folder / "onnx")
    script = f"""
from dit_hub import DiTPipeline
from huggingface_hub import HfApi
first = DiTPipeline.from_pretrained({str(folder / "0")!r})
second = DiTPipeline.from_pretrained({str(folder / "1")!r})
first.push_to_hub("me/tiny-dit", private=True)
HfApi().create_tag("me/tiny-dit", tag="v1")
HfApi().upload_folder(repo_id="me/tiny-dit", folder_path={str(folder / "1")!r})
HfApi().create_repo("me/tiny-onnx")
HfApi().upload_folder(repo_id="me/tiny-onnx", folder_path={str(folder / "onnx")!r})
onnx = DiTPipeline.from_pretrained({str(folder / "onnx")!r})
half = DiTPipeline.from_pretrained({str(folder / "1")!r}, variant="fp16")
print(json.dumps({{"first": digest(first), "second": digest(second), "onnx": digest(onnx), "half": digest(half)}}))
"""
    digests = person(hub, tmp_path, script, TOKEN)
    (folder / "digests.json").write_text(json.dumps(digests))
    return digests


def test_a_pushed_pipeline_draws_the_same_pictures_elsewhere(
    hub: LocalHub, pushed: dict[str, Any], tmp_path: Path
) -> None:
    script = f"""
import dit_hub
from dit_hub import DiTPipeline
from transformers import AutoModel
import diffusers
result = {{"newest": digest(DiTPipeline.from_pretrained("me/tiny-dit"))}}
result["tagged"] = digest(DiTPipeline.from_pretrained("me/tiny-dit", revision="v1"))
result["half"] = digest(DiTPipeline.from_pretrained("me/tiny-dit", variant="fp16"))
result["elsewhere"] = digest(DiTPipeline.from_pretrained("me/tiny-dit", cache_dir={str(tmp_path / "elsewhere")!r}))
result["cached"] = digest(DiTPipeline.from_pretrained("me/tiny-dit", local_files_only=True))
generic = diffusers.DiffusionPipeline.from_pretrained("me/tiny-dit", local_files_only=True)
same = generic.origin == DiTPipeline.from_pretrained("me/tiny-dit").origin
result["generic"] = [type(generic).__module__, digest(generic), same]
result["auto"] = type(AutoModel.from_pretrained("me/tiny-dit", subfolder="transformer")).__name__
print(json.dumps(result))
"""
    result = person(hub, tmp_path / "home", script, TOKEN)
    expected = {"newest": pushed["second"], "tagged": pushed["first"], "half": pushed["half"]}
    expected |= {"elsewhere": pushed["second"], "cached": pushed["second"]}
    expected |= {"generic": ["dit_hub.pipeline_dit", pushed["second"], True], "auto": "DiTTransformer"}
    assert result == expected
    assert pushed["first"] != pushed["second"]
    assert (tmp_path / "elsewhere").is_dir()
    offline = 'from dit_hub import DiTPipeline\nprint(json.dumps(digest(DiTPipeline.from_pretrained("me/tiny-dit"))))'
    before = len(hub.requests)
    assert person(hub, tmp_path / "home", offline, HF_HUB_OFFLINE="1") == pushed["second"]
    assert len(hub.requests) == before


def test_an_exported_pipeline_runs_from_the_hub(hub: LocalHub, pushed: dict[str, Any], tmp_path: Path) -> None:
    """By our class, and by diffusers' generic loader, which here is imported before ours."""
    script = """
from diffusers import DiffusionPipeline
from dit_hub import DiTPipeline
def look(loader):
    pipe = loader.from_pretrained("me/tiny-onnx")
    assert type(loader.from_pretrained("me/tiny-onnx", local_files_only=True)) is type(pipe)
    return [type(pipe).__name__, type(pipe.transformer).__name__, type(pipe.vae).__name__, digest(pipe)]
print(json.dumps([look(DiffusionPipeline), look(DiTPipeline)]))
"""
    expected = ["DiTPipeline", "ORTDiTTransformer", "ORTVAEDecoder", pushed["onnx"]]
    assert person(hub, tmp_path, script) == [expected, expected]


@pytest.mark.parametrize(
    "fields",
    [{}, {"num_classes": 0}, {"in_channels": 3}, {"num_classes": 3, "class_dropout_prob": 0.0}, {"num_classes": 1000}],
    ids=str,
)
def test_diffusers_generic_loader_opens_every_pipeline_of_ours(
    fields: dict[str, Any], make_pipeline: Callable[..., Any], tmp_path: Path
) -> None:
    pipe = make_pipeline(latent=fields.get("in_channels") != 3, **fields)
    pipe.save_pretrained(tmp_path / "ours")
    origin = Origin("a source", "dit-hub", license="mit")
    origin.save(tmp_path / "ours")
    opened = DiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert type(opened) is DiTPipeline
    assert opened.origin == origin
    labels = [1] if pipe.transformer.config.num_classes else None
    images = []
    for each in (opened, DiTPipeline.from_pretrained(tmp_path / "ours")):
        each.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(each(labels, num_inference_steps=2, generator=generator, output_type="pt").images)
    assert torch.equal(*images)
    half = DiffusionPipeline.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16
    assert half.vae is None or half.vae.dtype == torch.float32
    assert json.loads((tmp_path / "ours" / "model_index.json").read_text())["_class_name"] == "DiTPipeline"


def test_diffusers_generic_loader_opens_its_own_layout_with_its_own_class(
    make_pipeline: Callable[..., Any], tmp_path: Path
) -> None:
    make_pipeline(latent=True, timestep_freq_dim=256).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "stock", "diffusers")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "stock")) is diffusers.DiTPipeline
    with pytest.raises(OSError):  # with diffusers' own words
        DiffusionPipeline.from_pretrained("me/no-such-model")


def test_other_pipelines_cost_no_request_more_with_dit_hub(
    hub: LocalHub, make_pipeline: Callable[..., Any], tmp_path: Path
) -> None:
    make_pipeline(latent=True, timestep_freq_dim=256).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "stock", "diffusers")
    push = f"""
from huggingface_hub import HfApi
HfApi().create_repo("me/stock")
HfApi().upload_folder(repo_id="me/stock", folder_path={str(tmp_path / "stock")!r})
print(1)
"""
    person(hub, tmp_path / "author", push, TOKEN)
    requests = []
    for first in ("", "import dit_hub\n"):
        before = len(hub.requests)
        script = f"""
{first}from diffusers import DiffusionPipeline
print(json.dumps(type(DiffusionPipeline.from_pretrained("me/stock")).__module__))
"""
        assert person(hub, tmp_path / f"reader-{len(requests)}", script).startswith("diffusers.")  # pyright: ignore
        requests.append(sorted(map(str, hub.requests[before:])))
    assert requests[0] == requests[1]


def test_without_dit_hub_diffusers_says_what_it_always_says(make_pipeline: Callable[..., Any], tmp_path: Path) -> None:
    make_pipeline(in_channels=3).save_pretrained(tmp_path / "ours")
    script = f"""
import sys
sys.modules["dit_hub"] = None  # any import of it fails
from diffusers import DiffusionPipeline
DiffusionPipeline.from_pretrained({str(tmp_path / "ours")!r})
"""
    run = python("-c", script, cwd=tmp_path)
    assert run.returncode == 1
    assert "dit_hub/" not in run.stderr


def test_what_is_not_there_or_not_allowed_is_an_error(hub: LocalHub, pushed: dict[str, Any], tmp_path: Path) -> None:
    script = f"""
from dit_hub import DiTPipeline
load = DiTPipeline.from_pretrained
result = {{"private": attempt(lambda: load("me/tiny-dit"))}}
result["unknown"] = attempt(lambda: load("me/no-such-dit", token={TOKEN!r}))
result["revision"] = attempt(lambda: load("me/tiny-dit", revision="v9", token={TOKEN!r}))
result["token"] = digest(load("me/tiny-dit", token={TOKEN!r}))
print(json.dumps(result))
"""
    result = person(hub, tmp_path, script)
    assert result["token"] == pushed["second"]
    for problem, words in {"private": "me/tiny-dit", "unknown": "me/no-such-dit", "revision": "v9"}.items():
        assert result[problem].startswith("OSError: ")
        assert words in result[problem]


def test_a_download_that_breaks_off_is_completed_by_the_next(
    hub: LocalHub, pushed: dict[str, Any], tmp_path: Path
) -> None:
    script = """
from dit_hub import DiTPipeline
print(json.dumps(digest(DiTPipeline.from_pretrained("me/tiny-dit"))))
"""
    hub.cut_download_after = 20_000
    assert person(hub, tmp_path, script, TOKEN) == pushed["second"]
    assert hub.cut_download_after is None


# --- Pushing ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint under the name of a published one, converted with a small VAE."""
    folder = tmp_path_factory.mktemp("converted")
    golden = load_golden("dit_a")
    shutil.copy(golden.folder / "released.pt", folder / "DiT-XL-2-256x256.pt")
    small_vae().save_pretrained(folder / "vae")
    for layout in ("dit-hub", "official"):
        convert(
            folder / "DiT-XL-2-256x256.pt",
            folder / layout,
            layout,  # pyright: ignore[reportArgumentType]
            vae=str(folder / "vae"),
            num_attention_heads=4,
        )
    return folder


def files_of(hub: LocalHub, repository: str) -> dict[str, bytes]:
    commits = hub.repositories[repository].commits
    return commits[hub.repositories[repository].names["main"]]


def test_what_is_pushed_arrives_with_its_card_and_licence(hub: LocalHub, converted: Path, tmp_path: Path) -> None:
    run = dit_hub(hub, tmp_path / "a", "push", converted / "dit-hub", "me/by-command", "--private")
    assert run.returncode == 0, run.stderr
    assert f"Pushed to {hub.endpoint}/me/by-command/commit/" in run.stdout
    assert hub.repositories["me/by-command"].private
    card = ModelCard(files_of(hub, "me/by-command")["README.md"].decode())
    assert card.data.to_dict()["license"] == "cc-by-nc-4.0"
    assert card.data.to_dict()["base_model"] == "facebook/DiT-XL-2-256"
    assert 'from_pretrained("me/by-command")' in card.text
    (error,) = re.findall(r"\| before against after, read back \| (\S+) \|", card.text)
    assert float(error) < 1e-6  # the same weights; where they lie in memory decides how some processors sum
    shown = dit_hub(hub, tmp_path / "a", "card", converted / "dit-hub", "--repository", "me/by-command")
    assert shown.stdout.strip() == str(card).strip()
    # Somebody else pulls it, tunes it and pushes it on: the licence and the base model come along.
    script = """
from dit_hub import DiTPipeline
pipe = DiTPipeline.from_pretrained("me/by-command")
before = digest(pipe)
with torch.no_grad():
    pipe.transformer.final_layer.linear.bias += 0.1
url = pipe.push_to_hub("me/tuned", commit_message="Tuned")
print(json.dumps([before, digest(pipe), url]))
"""
    before, after, url = person(hub, tmp_path / "b", script, TOKEN)
    assert url.startswith(f"{hub.endpoint}/me/tuned/commit/")
    tuned = ModelCard(files_of(hub, "me/tuned")["README.md"].decode())
    assert tuned.data.to_dict()["license"] == "cc-by-nc-4.0"
    assert "They have been changed since." in tuned.text
    pull = 'from dit_hub import DiTPipeline\nprint(json.dumps(digest(DiTPipeline.from_pretrained("me/{}"))))'
    assert person(hub, tmp_path / "c", pull.format("by-command"), TOKEN) == before
    assert person(hub, tmp_path / "c", pull.format("tuned"), TOKEN) == after != before


def test_a_self_contained_repository_runs_with_and_without_dit_hub(
    hub: LocalHub, converted: Path, tmp_path: Path
) -> None:
    convert(converted / "dit-hub", tmp_path / "travels", self_contained=True)
    assert dit_hub(hub, tmp_path / "a", "push", tmp_path / "travels", "me/travels").returncode == 0
    with_it = 'from dit_hub import DiTPipeline\nprint(json.dumps(digest(DiTPipeline.from_pretrained("me/travels"))))'
    without = """
sys.modules["dit_hub"] = None  # any import of it fails
from diffusers import DiffusionPipeline
print(json.dumps(digest(DiffusionPipeline.from_pretrained("me/travels", trust_remote_code=True))))
"""
    modules = str(tmp_path / "b" / "modules")  # where diffusers puts the code
    assert person(hub, tmp_path / "b", without, TOKEN, HF_MODULES_CACHE=modules) == person(
        hub, tmp_path / "c", with_it, TOKEN
    )


def test_weights_are_pushed_as_sharded_safetensors(hub: LocalHub, converted: Path, tmp_path: Path) -> None:
    script = f"""
from dit_hub import DiTPipeline
pipe = DiTPipeline.from_pretrained({str(converted / "dit-hub")!r})
pipe.push_to_hub("me/sharded", max_shard_size="100KB")
pipe.to(dtype=torch.float16).push_to_hub("me/sharded", variant="fp16")
half = DiTPipeline.from_pretrained("me/sharded", variant="fp16", dtype=torch.float16)
print(json.dumps([weights(DiTPipeline.from_pretrained("me/sharded")), str(half.transformer.dtype)]))
"""
    sharded, dtype = person(hub, tmp_path, script, TOKEN)
    names = set(files_of(hub, "me/sharded"))
    assert {name for name in names if name.endswith((".bin", ".pt"))} == set()
    assert len([name for name in names if name.startswith("transformer/model-0000")]) > 2
    assert "transformer/model.fp16.safetensors" in names
    assert dtype == "torch.float16"
    whole = "from dit_hub import DiTPipeline\nprint(json.dumps(weights(DiTPipeline.from_pretrained({!r}))))"
    assert sharded == person(hub, tmp_path, whole.format(str(converted / "dit-hub")))


def test_a_card_that_a_person_wrote_stays(hub: LocalHub, converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted / "dit-hub", tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# Mine\n")
    assert dit_hub(hub, tmp_path, "push", tmp_path / "mine", "me/mine").returncode == 0
    assert files_of(hub, "me/mine")["README.md"].endswith(b"# Mine\n")


def test_the_official_layout_is_pushed_and_loads_by_the_address_in_its_card(
    hub: LocalHub, converted: Path, tmp_path: Path
) -> None:
    assert dit_hub(hub, tmp_path, "push", converted / "official", "me/official").returncode == 0
    code = ModelCard(files_of(hub, "me/official")["README.md"].decode()).text.split("```python\n")[1].split("```")[0]
    load = next(line for line in code.splitlines() if line.startswith("pipe = ")).replace(", vae=vae", ", vae=None")
    script = f"""
from dit_hub import DiTPipeline
{load}
print(json.dumps([pipe.origin.license, pipe.transformer.config.num_classes]))
"""
    assert person(hub, tmp_path, script) == ["cc-by-nc-4.0", 10]


@pytest.mark.parametrize(
    ("arguments", "token", "words"),
    [
        (("push", "{}", "me/refused"), None, "status 401, the token is missing or wrong"),
        (("convert", "https://example.com/me/official/resolve/main/model.pt", "out"), TOKEN, "no address of a file on"),
        (("convert", "https://huggingface.co/me/official/resolve/main/x.pt", "out"), TOKEN, "it has no x.pt"),
        (("convert", "https://huggingface.co/me/official/resolve/v9/x.pt", "out"), TOKEN, "it has no revision v9"),
        (("push", "{}", "me/refused"), "hf_wrong_secret", "status 401, the token is missing or wrong"),
        (("push", "{}", "me/refused", "--token", "hf_wrong_secret"), None, "status 401"),
        (("push", "{}/nothing", "me/refused"), TOKEN, "There is no folder"),
        (("push", "{}/transformer", "me/refused"), TOKEN, "has no folder transformer, so there is no model"),
        (("push", "{}", "a/b/c"), TOKEN, "a/b/c"),
        (("generate", "me/no-such-model"), TOKEN, "there is no such repository"),
        (("generate", "me/by-command"), "hf_wrong_secret", "or the token does not open it"),
        (("convert", "me/no-such-model", "out"), TOKEN, "there is no such repository"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    hub: LocalHub, converted: Path, tmp_path: Path, arguments: tuple[str, ...], token: str | None, words: str
) -> None:
    filled = [argument.format(converted / "dit-hub") for argument in arguments]
    run = as_person(hub, tmp_path / "home", [sys.executable, "-m", "dit_hub.cli", *filled], token)
    assert run.returncode == 2, run.stdout + run.stderr
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1, run.stderr
    assert words in run.stderr
    assert "hf_wrong_secret" not in run.stderr
    assert "me/refused" not in hub.repositories


def test_an_upload_that_breaks_off_is_completed(hub: LocalHub, converted: Path, tmp_path: Path) -> None:
    """The client tries again by itself; where it gives up, the next push sends only what has not arrived."""
    hub.blobs.clear()
    hub.cut_upload_after = 50_000
    start = len(hub.requests)
    run = dit_hub(hub, tmp_path, "push", converted / "dit-hub", "me/cut")
    assert hub.cut_upload_after is None  # it was cut
    uploads = [request for request in hub.requests[start:] if request.startswith("PUT /lfs/")]
    assert len(uploads) > len(set(uploads))
    assert run.returncode == 0, run.stderr
    pull = "from dit_hub import DiTPipeline\nprint(json.dumps(digest(DiTPipeline.from_pretrained({!r}))))"
    expected = person(hub, tmp_path / "a", pull.format(str(converted / "dit-hub")))
    assert person(hub, tmp_path / "a", pull.format("me/cut")) == expected


def test_a_push_that_failed_is_taken_up_by_the_next(hub: LocalHub, converted: Path, tmp_path: Path) -> None:
    hub.blobs.clear()
    hub.refuse_commits = True
    run = dit_hub(hub, tmp_path, "push", converted / "dit-hub", "me/late")
    assert run.returncode == 2
    assert "Cannot push to me/late on the Hub: it answers with status 503." in run.stderr
    assert set(files_of(hub, "me/late")) == {".gitattributes"}
    hub.refuse_commits = False
    start = len(hub.requests)
    assert dit_hub(hub, tmp_path, "push", converted / "dit-hub", "me/late").returncode == 0
    assert [request for request in hub.requests[start:] if request.startswith("PUT")] == []
    assert "transformer/model.safetensors" in files_of(hub, "me/late")


def test_a_file_on_the_hub_is_fetched_as_it_is_asked_for(hub: LocalHub, converted: Path, tmp_path: Path) -> None:
    """By a token, at a revision, into a folder, and then from there without the Hub."""
    weights = (converted / "official" / "model.pt").read_bytes()
    hub.repositories["me/files"], hub.repositories["me/vae"] = Repository(private=True), Repository(private=True)
    hub.repositories["me/vae"].commit("main", {path.name: path.read_bytes() for path in (converted / "vae").iterdir()})
    hub.repositories["me/files"].commit("main", {"old.pt": weights})
    hub.repositories["me/files"].commit("v2", {"model.pt": weights})
    script = f"""
from dit_hub import DiTPipeline
def load(file="model.pt", **options):
    url = "https://huggingface.co/me/files/resolve/main/" + file
    pipe = DiTPipeline.from_single_file(url, vae=None, num_attention_heads=4, **options)
    return pipe.transformer.config.num_classes
cache = {str(tmp_path / "cache")!r}
result = {{"no token": attempt(load), "main": attempt(lambda: load(token={TOKEN!r}))}}
result["v2"] = attempt(lambda: load(token={TOKEN!r}, revision="v2", cache_dir=cache))
url = "https://huggingface.co/me/files/resolve/v2/model.pt"
with_vae = DiTPipeline.from_single_file(url, vae="me/vae", num_attention_heads=4, token={TOKEN!r}, cache_dir=cache)
result["vae"] = type(with_vae.vae).__name__
result["again"] = attempt(lambda: load(revision="v2", cache_dir=cache, local_files_only=True))
result["elsewhere"] = attempt(lambda: load(revision="v2", local_files_only=True))
print(json.dumps(result))
"""
    result = person(hub, tmp_path / "home", script)
    assert (result["v2"], result["again"], result["vae"]) == (10, 10, "AutoencoderKL")
    assert "there is no such repository, or the token does not open it" in result["no token"]
    assert "it has no model.pt" in result["main"]
    assert "cannot be reached, and the files are not in the cache" in result["elsewhere"]
    assert (tmp_path / "cache").is_dir()


# --- While training --------------------------------------------------------------------------------------------------


TRAINING = ("train", "toy", "images_per_class=16", "epochs=5", "batch_size=64", "save_every=8")


def test_checkpoints_and_the_result_are_pushed_while_training_goes_on(hub: LocalHub, tmp_path: Path) -> None:
    out = tmp_path / "toy"
    run = dit_hub(hub, tmp_path, *TRAINING, "push_to_hub=me/trained", "--out", out)
    assert run.returncode == 0, run.stderr
    assert f"Pushed: {hub.endpoint}/me/trained/commit/" in run.stdout
    first, *_, last = hub.repositories["me/trained"].messages
    assert (first, last) == ("Step 8", "Upload toy")
    files = files_of(hub, "me/trained")
    assert {"README.md", "model_index.json", "training.json", "samples.png"} <= set(files)
    assert any(name.startswith("runs/events") for name in files)
    assert files["transformer/model.safetensors"] == (out / "transformer" / "model.safetensors").read_bytes()


def test_a_hub_that_fails_does_not_end_a_run(hub: LocalHub, tmp_path: Path) -> None:
    hub.refuse_commits = True
    out = tmp_path / "toy"
    run = dit_hub(hub, tmp_path, *TRAINING, "push_to_hub=me/unlucky", "--out", out)
    hub.refuse_commits = False
    assert run.returncode == 2
    assert "Step 8 was not pushed to me/unlucky" in run.stderr
    assert f"The whole result is in {out}; `dit-hub push {out} me/unlucky` tries again." in run.stderr.splitlines()[-1]
    assert (out / "model_index.json").is_file()


def test_a_repository_that_is_refused_stops_before_the_work(hub: LocalHub, tmp_path: Path) -> None:
    run = dit_hub(hub, tmp_path, *TRAINING, "push_to_hub=me/other", "--out", tmp_path / "toy", token="hf_wrong")
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert "Cannot push to me/other on the Hub" in run.stderr
    assert not (tmp_path / "toy").exists()


# --- diffusers' repositories -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("repository", ["facebook/DiT-XL-2-256", "facebook/DiT-XL-2-512"])
def test_the_published_repositories_compute_the_official_numbers(
    repository: str, hub: LocalHub, tmp_path: Path
) -> None:
    """The golden model in the published repositories' files: PyTorch's .bin, and the class by its first name."""
    golden = load_golden("dit_a")
    weights = to_diffusers(golden.model().state_dict(), 2)
    config = {
        **diffusers_config(golden.model().config),
        "_class_name": "Transformer2DModel",
        "norm_type": "ada_norm_zero",
    }
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": "0.12.0.dev0",
        "id2label": {"0": "tench, Tinca tinca"},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    small_vae().save_pretrained(tmp_path / "vae", safe_serialization=False)
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    (tmp_path / "transformer").mkdir()
    torch.save(weights, tmp_path / "transformer" / "diffusion_pytorch_model.bin")
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    files = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    hub.repositories[repository] = Repository()
    hub.repositories[repository].commit("main", files)
    script = f"""
import logging
from safetensors.torch import load_file
from dit_hub import DiTPipeline
pipe = DiTPipeline.from_pretrained({repository!r})
expected = load_file({str(golden.folder / "expected.safetensors")!r})
with torch.no_grad():
    sample = pipe.transformer(expected["forward.x"], expected["forward.t"], expected["forward.y"]).sample
pipe.save_pretrained({str(tmp_path / "saved")!r})
error = (sample - expected["forward.out"]).abs().max().item()
stock = DiTPipeline.from_pretrained({repository!r}, timestep_freq_shift=1, local_files_only=True)
shifts = [each.transformer.config.timestep_freq_shift for each in (pipe, stock)]
print(json.dumps([error, *shifts, pipe.origin.license]))
"""
    run = as_person(hub, tmp_path / "home", [sys.executable, "-c", SAMPLE + script])
    assert run.returncode == 0, run.stderr
    error, shift, stock_shift, license = json.loads(run.stdout.splitlines()[-1])
    assert error < 2e-6
    assert (shift, stock_shift, license) == (0, 1, "cc-by-nc-4.0")
    assert "timestep_freq_shift=0, since it holds official weights; pass 1 for diffusers' own numbers" in run.stderr
    assert (tmp_path / "saved" / "transformer" / "model.safetensors").is_file()
