"""The benchmark of Markov chains: what its chains are, and what it measures."""

import torch

from tests.benchmarks import markov


def test_a_chain_leaves_its_home_group_with_the_probability_of_the_leakage():
    matrix = markov.transitions("forget1", torch.Generator().manual_seed(0))
    home = list(markov.GROUPS["forget1"])
    torch.testing.assert_close(matrix.sum(1), torch.ones(10))
    torch.testing.assert_close(matrix[:, home].sum(1), torch.full((10,), 0.8))


def test_a_model_has_no_divergence_from_itself_and_some_from_another():
    rows = markov.draw("retain", 20, torch.Generator().manual_seed(0))
    data = {"retain": markov.Sequences(rows, rows)}
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(markov.Transformer().eval())
    theirs = {"retain": markov.predictions(models[0], rows)}
    assert abs(markov.compare(models[0], theirs, data)["retain.kl"]) < 1e-6
    assert markov.compare(models[1], theirs, data)["retain.kl"] > 1e-4
