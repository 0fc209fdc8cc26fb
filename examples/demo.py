"""`make demo`: the embedded toy samples all its classes in PyTorch and, exported to ONNX, on ONNX Runtime."""

import tempfile
import time
from pathlib import Path

import torch

from dit_hub import DiTPipeline
from dit_hub.export import export_onnx
from dit_hub.extras import quiet_libraries
from dit_hub.visualize import Trajectory, difference, image_grid

OUTPUTS = Path(__file__).parent.parent / "outputs"
STEPS = 50


def sample(pipeline: DiTPipeline, trajectory: Trajectory | None = None) -> tuple[torch.Tensor, float]:
    """One image of each class from the same noise, and the seconds it took."""
    pipeline.set_progress_bar_config(disable=True)
    classes = list(pipeline.id2label)
    pipeline(classes, num_inference_steps=2)  # the first run of a process is slower
    start = time.perf_counter()
    images = pipeline(
        classes,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        callback_on_step_end=trajectory,
    ).images
    return images, time.perf_counter() - start


def main() -> None:
    quiet_libraries()
    OUTPUTS.mkdir(exist_ok=True)
    toy = DiTPipeline.from_pretrained("dit-toy-shapes")
    trajectory = Trajectory()
    images, seconds = sample(toy)
    sample(toy, trajectory)
    print(f"PyTorch       {len(images)} images, {STEPS} steps: {seconds:.2f} s")

    with tempfile.TemporaryDirectory() as folder:
        parity = export_onnx(toy, Path(folder) / "onnx")["transformer"]
        print(f"ONNX export   relative error against PyTorch: {parity.relative_error:.1e}")
        ort_images, ort_seconds = sample(DiTPipeline.from_pretrained(Path(folder) / "onnx"))
    print(f"ONNX Runtime  {len(ort_images)} images, {STEPS} steps: {ort_seconds:.2f} s")
    print(f"Largest difference of one pixel: {difference(images, ort_images)} of 255")

    grid = image_grid(toy.numpy_to_pil(images.permute(0, 2, 3, 1).numpy()), 4, list(toy.id2label.values()))
    grid.save(OUTPUTS / "toy-grid.png")
    trajectory.image(toy).save(OUTPUTS / "toy-trajectory.png")
    print(f"Written: {OUTPUTS / 'toy-grid.png'} and {OUTPUTS / 'toy-trajectory.png'}")


if __name__ == "__main__":
    main()
