"""Digits in 8, 4, 2 and 1 steps, beside their teacher's in 250: the table and the figure of docs/distillation.md.

    dit-hub train digits --out outputs/digits
    python examples/distillation.py outputs/digits --students outputs/distilled --out docs/distillation.png

Students that are not in the folder yet are trained, each from the one that is named; the commands are printed.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler
from rich.console import Console
from rich.progress import track

from dit_hub import DiTPipeline
from dit_hub.evaluation import evaluate, sample_images
from dit_hub.extras import quiet_libraries
from dit_hub.training.loop import train
from dit_hub.training.output import save_result
from dit_hub.training.recipe import get_recipe
from dit_hub.visualize import image_grid

GUIDANCE = 2.0
METRICS = ["fid", "precision", "recall"]

# Students by name: the model to start from, and settings of the recipe distill.
STUDENTS: dict[str, tuple[str, str]] = {
    "guided": ("", f"distill=guidance guidance_scale={GUIDANCE:g} ema_decay=0.99 steps=1000"),
    "steps-8": ("guided", "guidance_scale=1 teacher_steps=64 student_steps=8 steps=450"),
    "steps-4": ("steps-8", "guidance_scale=1 teacher_steps=8 student_steps=4 steps=200"),
    "steps-2": ("steps-4", "guidance_scale=1 teacher_steps=4 student_steps=2 steps=250"),
    "steps-1": ("steps-2", "guidance_scale=1 teacher_steps=2 student_steps=1 steps=350"),
    "consistency": ("guided", "distill=consistency guidance_scale=1 teacher_steps=50 steps=600"),
}


class Row(NamedTuple):
    """A model, its steps, and how it is guided."""

    model: str  # "" is the teacher
    steps: int
    guidance: float = 1.0
    ddim: bool = False

    @property
    def name(self) -> str:
        kind = "progressive" if self.model.startswith("steps-") else self.model or "teacher"
        return f"{kind}, {self.steps}" + (" DDIM" if self.ddim else "")

    @property
    def passes(self) -> int:
        return self.steps * (1 if self.guidance == 1 else 2)


FEW = (8, 4, 2, 1)
ROWS = [
    Row("", 250, GUIDANCE),
    *(Row("", steps, GUIDANCE, ddim=True) for steps in FEW),
    Row("guided", 50),
    *(Row(f"steps-{steps}", steps) for steps in FEW),
    *(Row("consistency", steps) for steps in (4, 2, 1)),
]


def load(row: Row, teacher: str, students: Path) -> Any:
    pipeline: Any = DiTPipeline.from_pretrained(students / row.model if row.model else teacher)
    pipeline.set_progress_bar_config(disable=True)
    if row.ddim:
        config = pipeline.scheduler.config
        pipeline.scheduler = DDIMScheduler.from_config(config, clip_sample=False, timestep_spacing="trailing")
    return pipeline


def train_students(teacher: str, students: Path, quick: bool, console: Console) -> None:
    for name, (start, settings) in STUDENTS.items():
        out, settings = students / name, f"init_from={students / start if start else teacher} {settings}"
        command = f"dit-hub train distill {settings} --out {out}"
        console.print(command, highlight=False, soft_wrap=True)
        if not out.exists():
            changes: dict[str, Any] = dict(setting.split("=", 1) for setting in settings.split())
            changes |= {"steps": 3, "batch_size": 16} if quick else {}
            recipe = get_recipe("distill").with_settings({**changes, "sample_every": 0, "save_every": 0})
            save_result(train(recipe), out, command)


def measure(row: Row, teacher: str, students: Path, count: int) -> str:
    """A line of the table."""
    samples = students / "samples" / row.name.replace(", ", "-").replace(" ", "-")
    sample_images(load(row, teacher, students), samples, count, num_inference_steps=row.steps,
                  guidance_scale=row.guidance)  # fmt: skip
    results: Any = evaluate(samples, "digits", METRICS, extractor="digits")
    found = [results[name] for name in METRICS]
    values = [f"{one.value:.3f} ± {(one.high - one.low) / 2:.3f}" for one in found]
    return f"| {row.name} | {row.passes} | {' | '.join(values)} |"


def draw(rows: list[Row], teacher: str, students: Path) -> Any:
    """A row of the ten digits for each model and number of steps, all from the same noise."""
    images: list[Any] = []
    for row in rows:
        pipeline = load(row, teacher, students)
        noise = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        images += pipeline(list(range(10)), guidance_scale=row.guidance, num_inference_steps=row.steps, latents=noise,
                           generator=torch.Generator().manual_seed(0)).images  # fmt: skip
    return image_grid(images, 10, min_side=48, row_names=[row.name for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("teacher", help="pipeline folder of the digits")
    parser.add_argument("--students", type=Path, default=Path("outputs/distilled"))
    parser.add_argument("--out", type=Path, default=Path("distillation.png"))
    parser.add_argument("--quick", action="store_true", help="a look at how it works")
    arguments = parser.parse_args()
    quiet_libraries()
    console, rows = Console(), ROWS
    train_students(arguments.teacher, arguments.students, arguments.quick, console)
    if arguments.quick:
        rows = [row for row in ROWS if row.steps <= 4]
    lines = [measure(row, arguments.teacher, arguments.students, 40 if arguments.quick else 1000)
             for row in track(rows, "measuring", console=Console(stderr=True))]  # fmt: skip
    head = ["| model, steps | passes | FD-digits | precision | recall |", "|---|---:|---:|---:|---:|"]
    console.print("\n".join([*head, *lines]), highlight=False, soft_wrap=True)
    shown = [Row("", 250, GUIDANCE, ddim=True), *rows[1:]] if not arguments.quick else rows
    draw(shown, arguments.teacher, arguments.students).save(arguments.out)


if __name__ == "__main__":
    main()
