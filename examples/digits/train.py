"""Step `train`: digits.npz -> model.joblib, one line of metrics per epoch."""

import json
import time

import joblib
import numpy as np
import valohai
from sklearn.metrics import log_loss
from sklearn.neural_network import MLPClassifier


def main():
    valohai.prepare(
        step="train",
        image="python:3.11-slim",
        default_parameters={
            "epochs": 20,
            "learning-rate": 0.01,
            "hidden-units": 64,
            "activation": "relu",
            "shuffle": True,
        },
        default_inputs={"dataset": ""},
    )
    data = np.load(valohai.inputs("dataset").path())
    images, labels = data["x_train"], data["y_train"]
    classes = np.unique(labels)
    model = MLPClassifier(
        hidden_layer_sizes=(valohai.parameters("hidden-units").value,),
        activation=valohai.parameters("activation").value,
        learning_rate_init=valohai.parameters("learning-rate").value,
        batch_size=64,
        random_state=0,
    )

    shuffle = valohai.parameters("shuffle").value
    order = np.random.default_rng(0)
    for epoch in range(1, valohai.parameters("epochs").value + 1):
        started = time.perf_counter()
        rows = order.permutation(len(labels)) if shuffle else np.arange(len(labels))
        model.partial_fit(images[rows], labels[rows], classes=classes)
        with valohai.logger() as logger:
            logger.log("epoch", epoch)
            logger.log("loss", round(float(log_loss(labels, model.predict_proba(images))), 5))
            logger.log("train_accuracy", round(float(model.score(images, labels)), 5))
            logger.log(
                "test_accuracy", round(float(model.score(data["x_test"], data["y_test"])), 5)
            )
            logger.log("epoch_seconds", round(time.perf_counter() - started, 4))

    outputs = valohai.outputs()
    joblib.dump(model, outputs.path("model.joblib"), compress=3)
    with open(outputs.path("model.joblib.metadata.json"), "w") as sidecar:
        json.dump({"valohai.model-versions": ["model://digits/"]}, sidecar)


if __name__ == "__main__":
    main()
