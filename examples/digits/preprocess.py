"""Step `preprocess`: scikit-learn's digits -> digits.npz, and a picture of some of them."""

import json

import numpy as np
import valohai
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def draw_samples(images, labels, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 10, figsize=(8, 2.6))
    for axis, image, label in zip(axes.flat, images, labels, strict=False):
        axis.imshow(image, cmap="gray_r")
        axis.set_title(str(label), fontsize=8)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main():
    valohai.prepare(
        step="preprocess",
        image="python:3.11-slim",
        default_parameters={"test-share": 0.25, "seed": 7},
    )

    digits = load_digits()
    x_train, x_test, y_train, y_test = train_test_split(
        (digits.data / 16.0).astype("float32"),
        digits.target,
        test_size=valohai.parameters("test-share").value,
        random_state=valohai.parameters("seed").value,
        stratify=digits.target,
    )

    outputs = valohai.outputs()
    np.savez_compressed(
        outputs.path("digits.npz"),
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
    )
    # A sidecar: what it says is kept with the file.
    with open(outputs.path("digits.npz.metadata.json"), "w") as sidecar:
        json.dump(
            {"valohai.tags": ["digits"], "images": len(digits.target), "pixels": "8x8"}, sidecar
        )
    draw_samples(digits.images, digits.target, outputs.path("samples.png"))

    with valohai.logger() as logger:
        logger.log("train_images", len(y_train))
        logger.log("test_images", len(y_test))


if __name__ == "__main__":
    main()
