"""Our scores beside kronfluence's."""

import pytest
import torch
from architectures import named
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from pure import pure_scores
from samples import Pairs, tensors
from torch import nn


class Classification(Task):
    def compute_train_loss(self, batch, model, sample=False):
        assert not sample, "the empirical Fisher takes the true labels"
        inputs, labels = batch
        return nn.functional.cross_entropy(model(inputs), labels, reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self):
        return ["fc"]


@pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning")  # kronfluence's own
def test_diagonal_fisher_equals_kronfluence(tmp_path):
    """Its aggregated query gradient is a sum and its scores are without the sign: ours times -N."""
    model, (inputs, labels) = named("fc").eval(), tensors(41)
    dataset = torch.utils.data.TensorDataset(inputs, labels)
    ours = torch.from_numpy(pure_scores(model, Pairs(inputs, labels)))
    task = Classification()
    analyzer = Analyzer("head", prepare_model(model, task), task, cpu=True, output_dir=str(tmp_path), disable_tqdm=True)
    analyzer.fit_all_factors(
        "diagonal", dataset, per_device_batch_size=8, factor_args=FactorArguments("diagonal", use_empirical_fisher=True)
    )
    analyzer.compute_pairwise_scores(
        "scores", "diagonal", dataset, dataset, per_device_query_batch_size=8, per_device_train_batch_size=8,
        score_args=ScoreArguments(damping_factor=0.01, aggregate_query_gradients=True),
    )  # fmt: skip
    theirs = analyzer.load_pairwise_scores("scores")["all_modules"].squeeze(0).double()
    assert (theirs + 41 * ours).abs().max() <= 1e-5 * theirs.abs().max()
