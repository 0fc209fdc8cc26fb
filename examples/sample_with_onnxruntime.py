"""Sample with onnxruntime, numpy and Pillow alone, from a file that `dit-hub export onnx --parts sampler` wrote:

python examples/sample_with_onnxruntime.py OUT/transformer/model.onnx red-circle blue-cross
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

path, *names = sys.argv[1:]
session = onnxruntime.InferenceSession(path)
metadata = session.get_modelmeta().custom_metadata_map
facts = {key.split(".")[1]: json.loads(text) for key, text in metadata.items() if key.startswith("dit_hub.")}
ids = {name.split(",")[0]: int(index) for index, name in facts["id2label"].items()}
labels, null = [ids[name] for name in names], facts["null_class"]
table = np.array(facts["table"], np.float32)  # 50 steps of the model's own scheduler
shape, generator = (len(names), *facts["latents"]), np.random.default_rng(0)
inputs = {
    "latents": generator.standard_normal(shape, np.float32),
    "noise": generator.standard_normal((len(table), *shape), np.float32),
    "class_labels": np.array(labels if null is None else labels + [null] * len(labels)),
    "table": table,
    "guidance_scale": np.array(4, np.float32),
}
wanted = {entry.name for entry in session.get_inputs()}
images = session.run(["images"], {name: value for name, value in inputs.items() if name in wanted})[0]
for number, image in enumerate(np.asarray(images)):
    Image.fromarray(image).save(f"sample-{number}.png")
