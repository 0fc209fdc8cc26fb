"""LitServe's batching, for `benchmarks/serving.py`: requests of a window, drawn together where they can be.

pip install --no-deps --target build/litserve litserve==0.2.19 pyzmq
PYTHONPATH=build/litserve python benchmarks/serving.py
"""

import sys
from typing import Any

import litserve  # pyright: ignore[reportMissingImports]

from request_batching import WINDOW, Asked, draw_batch, encoded, load


class Drawing(litserve.LitAPI):
    """A batch of LitServe may hold requests of several numbers of steps, each of which takes a call."""

    def setup(self, device: Any) -> None:
        self.pipeline = load(sys.argv[1], int(sys.argv[4]))

    def decode_request(self, request: dict[str, Any]) -> Asked:
        return Asked(**request)

    def batch(self, inputs: list[Asked]) -> list[Asked]:
        return inputs

    def predict(self, batch: list[Asked]) -> list[Any]:
        images: dict[int, Any] = {}
        for key in dict.fromkeys(asked.key for asked in batch):
            numbers = [number for number, asked in enumerate(batch) if asked.key == key]
            drawn = draw_batch(self.pipeline, [batch[number] for number in numbers])
            images.update(zip(numbers, drawn, strict=True))
        return [images[number] for number in range(len(batch))]

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: Any) -> dict[str, Any]:
        return {"data": [{"b64_json": encoded(output)}]}


if __name__ == "__main__":
    api = Drawing(max_batch_size=int(sys.argv[3]), batch_timeout=WINDOW, api_path="/v1/images/generations")
    litserve.LitServer(api, accelerator="cpu", timeout=False).run(port=int(sys.argv[2]), generate_client_file=False)
