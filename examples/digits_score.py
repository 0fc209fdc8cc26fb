"""How many sampled digits a classifier of the real ones recognises.

    dit-hub train digits --out outputs/digits
    python examples/digits_score.py outputs/digits

The classifier is scikit-learn's support vector machine on the 1,797 real digits. Its own accuracy is measured on half
of them, after it has seen the other half.
"""

import sys
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from dit_hub import DiTPipeline
from dit_hub.extras import quiet_libraries

PER_CLASS, STEPS, GUIDANCE = 20, 50, 2.0
SETTINGS: dict[str, Any] = {"gamma": 0.001}


def main() -> None:
    quiet_libraries()
    real, labels = load_digits(return_X_y=True)
    half = SVC(**SETTINGS).fit(real[::2], labels[::2])
    print(f"real digits it has not seen: {half.score(real[1::2], labels[1::2]):.1%} recognised")
    judge = SVC(**SETTINGS).fit(real, labels)
    pipeline = DiTPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "outputs/digits")
    pipeline.set_progress_bar_config(disable=True)
    wanted = [digit for digit in range(10) for _ in range(PER_CLASS)]
    for guidance in (1.0, GUIDANCE):
        generator = torch.Generator().manual_seed(0)
        images = pipeline(
            wanted, guidance_scale=guidance, num_inference_steps=STEPS, generator=generator, output_type="np"
        ).images
        sampled = (images * 16).round().reshape(len(wanted), -1)
        print(f"sampled with guidance {guidance:g}: {judge.score(sampled, wanted):.1%} recognised")


if __name__ == "__main__":
    main()
