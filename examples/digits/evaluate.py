"""Step `evaluate`: digits.npz and model.joblib -> confusion-matrix.png, report.json and the final metrics."""

import json

import joblib
import numpy as np
import valohai
from sklearn.metrics import accuracy_score, classification_report, confusion_matrix


def draw(matrix, accuracy, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 4.6))
    picture = axis.imshow(matrix, cmap="Blues")
    figure.colorbar(picture, shrink=0.8)
    middle = matrix.max() / 2
    for (row, column), count in np.ndenumerate(matrix):
        if count:
            colour = "white" if count > middle else "black"
            axis.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    axis.set(xlabel="predicted", ylabel="true", xticks=range(10), yticks=range(10))
    axis.set_title(f"Test accuracy {accuracy:.1%}")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main():
    valohai.prepare(
        step="evaluate",
        image="python:3.11-slim",
        default_inputs={"dataset": "", "model": ""},
    )
    data = np.load(valohai.inputs("dataset").path())
    model = joblib.load(valohai.inputs("model").path())
    truth, predicted = data["y_test"], model.predict(data["x_test"])
    accuracy = float(accuracy_score(truth, predicted))
    report = classification_report(truth, predicted, output_dict=True)

    outputs = valohai.outputs()
    draw(confusion_matrix(truth, predicted), accuracy, outputs.path("confusion-matrix.png"))
    with open(outputs.path("report.json"), "w") as file:
        json.dump(report, file, indent=2)

    worst = min((str(digit) for digit in range(10)), key=lambda digit: report[digit]["f1-score"])
    with valohai.logger() as logger:
        logger.log("accuracy", round(accuracy, 5))
        logger.log("macro_f1", round(float(report["macro avg"]["f1-score"]), 5))
        logger.log("mistakes", int((truth != predicted).sum()))
        logger.log("hardest_digit", worst)


if __name__ == "__main__":
    main()
