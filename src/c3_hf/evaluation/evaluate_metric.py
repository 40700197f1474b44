"""The metrics as a module of Hugging Face `evaluate`: `evaluate.load(<path of this file>)`, without a network.

    evaluate.load(path)                      every metric of text
    evaluate.load(path, "char_precision")    one metric of c3_hf.evaluation.metrics

The formulas stay in `c3_hf.evaluation.metrics`; only the packaging is here.
"""

import datasets
import evaluate

from c3_hf.evaluation import catalogue
from c3_hf.evaluation.records import mean_of


_CITATION = """@article{c3, title={Context Cascade Compression: Exploring the Upper Limits of Text Compression},
journal={arXiv preprint arXiv:2511.15244}, year={2025}}"""


class RestorationMetric(evaluate.Metric):
    """Mean over the pairs of one metric (named by the configuration) or of every metric of text (none named)."""

    def _metric(self):
        return None if self.config_name in (None, "default") else catalogue.find("metrics", self.config_name)

    def _info(self):
        metric = self._metric()
        inputs = metric.inputs if metric else "text"
        text, ids = datasets.Value("string"), datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=metric.function.__doc__ if metric else __doc__,
            citation=_CITATION,
            inputs_description=f"predictions and references of equal number, one pair an item ({inputs})",
            features=datasets.Features(
                {
                    "predictions": ids if inputs == "tokens" else text,
                    "references": {"text": text, "tokens": ids, "answer": datasets.Sequence(text)}[inputs],
                }
            ),
        )

    def _compute(self, predictions, references):
        metric = self._metric()
        pairs = zip(predictions, references)
        if metric is None:
            return mean_of([catalogue.score("text", prediction, reference) for prediction, reference in pairs])
        results = [metric.function(prediction, reference) for prediction, reference in pairs]
        return mean_of([result if isinstance(result, dict) else {self.config_name: result} for result in results])
