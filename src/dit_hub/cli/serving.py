"""`dit-hub serve`."""

import hashlib
import ipaddress
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..extras import quiet_libraries, require
from .common import check_device
from .sampling import SCHEDULERS_HELP, check_dtype, load_pipeline


def serve(
    models: Annotated[
        list[str], typer.Argument(help="Hub ids, folders, or dit-toy-shapes; the first is loaded at the start.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for any free one.")] = 8000,
    max_batch: Annotated[int, typer.Option(help="Rows of a pass of the denoiser; a guided image takes two.")] = 32,
    memory: Annotated[
        float | None, typer.Option(help="GiB of weights at once; the model unused longest goes for another.")
    ] = None,
    scheduler: Annotated[str | None, typer.Option(help=f"{SCHEDULERS_HELP} Requests may name others.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; the decoder stays in float32.")] = "float32",
    threads: Annotated[int | None, typer.Option(help="Processor threads; default: one per core.")] = None,
    runtime: Annotated[
        str | None,
        typer.Option(help="onnxruntime or openvino: what models in PyTorch are exported to when they are loaded."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps, for models in PyTorch.")] = "cpu",
    api_key: Annotated[
        str | None,
        typer.Option(envvar="DIT_HUB_API_KEY", show_envvar=False,
                     help="Key that requests must carry; better in the environment, as DIT_HUB_API_KEY."),
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Listen on other addresses without a key.")] = False,
    batch_dir: Annotated[Path | None, typer.Option(help="Folder of /v1/batches, which are off without it.")] = None,
    max_images: Annotated[int, typer.Option(help="Most images of a request.")] = 10,
    max_steps: Annotated[int, typer.Option(help="Most denoising steps of an image.")] = 250,
    max_side: Annotated[
        int | None, typer.Option(help="Longest side of an image, in pixels; default: twice the model's own.")
    ] = None,
    max_waiting: Annotated[int, typer.Option(help="Most images that wait; further requests get status 429.")] = 1024,
    request_seconds: Annotated[float, typer.Option(help="Time until a request must be answered.")] = 300.0,
    shutdown_seconds: Annotated[float, typer.Option(help="Time for accepted requests after SIGTERM or Ctrl-C.")] = 30.0,
) -> None:  # fmt: skip
    """Serve models over HTTP, in the shape of OpenAI's images API."""
    if not all(model.strip() for model in models):
        raise ValueError("The name of a model is empty; give folders, Hub ids or dit-toy-shapes.")
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, "serve")
    if not _is_loopback(host) and not api_key and not no_auth:
        raise ValueError(f"On {host} anyone could use this server: give it a key with DIT_HUB_API_KEY or --api-key, or "
                         "pass --no-auth.")  # fmt: skip
    quiet_libraries()
    check_dtype(dtype)
    _check_runtime(runtime, device)
    check_device(device)
    from ..checks import real_number, whole_number
    from ..serving.app import create_app
    from ..serving.batches import Batches
    from ..serving.limits import Limits
    from ..serving.logs import log_as_json
    from ..serving.models import Models, named_sources
    from ..serving.server import listen, make_server

    limits = Limits(
        images=whole_number("--max-images", max_images, 1),
        steps=whole_number("--max-steps", max_steps, 1),
        side=None if max_side is None else whole_number("--max-side", max_side, 1),
        waiting=whole_number("--max-waiting", max_waiting, 1),
        seconds=real_number("--request-seconds", request_seconds, 1),
    )
    real_number("--shutdown-seconds", shutdown_seconds, 0)
    memory_limit = None if memory is None else int(real_number("--memory", memory, 0) * 2**30)
    load: Any = partial(load_pipeline, scheduler=scheduler, threads=threads, device=device, dtype=dtype)
    options: dict[str, Any] = {"max_batch": whole_number("--max-batch", max_batch, 2), "max_waiting": limits.waiting}
    with listen(host, port) as socket, tempfile.TemporaryDirectory(prefix="dit-hub-") as exports:
        if runtime is not None:
            load = partial(_load_exported, runtime=runtime, folder=Path(exports), load=load)
        served = Models(named_sources(models), load, memory_limit, **options)
        batches = None if batch_dir is None else Batches(batch_dir, served, limits)
        app = create_app(served, limits, api_key or None, batches)
        url = f"http://{f'[{host}]' if ':' in host else host}:{socket.getsockname()[1]}"
        log_as_json()
        server = make_server(app, shutdown_seconds)
        problems: list[ValueError] = []
        served.start(lambda problem: (problems.append(problem), server.stop()))
        print(f"Serving {', '.join(served.names)} at {url}; Ctrl-C ends it. To try it:")
        print(_curl(url, served.names[0], bool(api_key)), flush=True)
        server.run([socket])
        if problems:
            raise problems[0]


def _check_runtime(runtime: str | None, device: str) -> None:
    if runtime is None:
        return
    if runtime not in ("onnxruntime", "openvino"):
        raise ValueError(f"--runtime must be onnxruntime or openvino, not {runtime!r}; for TensorRT, serve a "
                         "folder that `dit-hub export tensorrt` made.")  # fmt: skip
    if device != "cpu":
        raise ValueError(
            f"--runtime {runtime} computes on the processor; leave out --device, or serve an exported folder."
        )
    for module in ("onnx", runtime):
        require(module, "onnx" if runtime == "onnxruntime" else "openvino")


def _load_exported(source: str, runtime: str, folder: Path, load: Callable[[str], Any]) -> Any:
    """The pipeline of a source on another runtime than PyTorch; one that is an export stays as it is.

    A model that was let go and comes back is loaded from the export of the first time.
    """
    import torch

    from dit_hub.export import export_onnx

    from ..pipeline_dit import DiTPipeline

    exported = folder / hashlib.sha256(source.encode()).hexdigest()[:16]
    if not exported.exists():
        pipeline = DiTPipeline.from_pretrained(source)
        if not isinstance(pipeline.transformer, torch.nn.Module):
            return load(source)
        export_onnx(pipeline, exported, runtime=runtime, precompute=True)
    return load(str(exported))


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _curl(url: str, model: str, keyed: bool) -> str:
    key = ' -H "Authorization: Bearer $DIT_HUB_API_KEY"' if keyed else ""
    return (f"curl {url}/v1/images/generations -H 'Content-Type: application/json'{key} -o image.png "
            f"""-d '{{"model": "{model}", "prompt": "0", "response_format": "png"}}' -f""")  # fmt: skip
