"""Which rows the study of super-classes forgets and measures."""

import torch

from tests.benchmarks.superclass import CLASSES, Case
from tests.benchmarks.train_cifar import forget_rows


def test_several_classes_are_left_out_of_training():
    assert forget_rows(torch.tensor([0, 1, 2, 12, 1]), "class:1,12").tolist() == [False, True, False, True, True]


def test_a_forgotten_class_is_measured_apart_from_its_siblings_and_the_others():
    labels, coarse = torch.arange(CLASSES), torch.arange(CLASSES) // 5
    images = labels[:, None, None, None].expand(-1, 3, 2, 2)
    case = Case.of("class:7", (images, labels), (images, labels), coarse)
    assert case.forget[1].tolist() == [7]
    assert case.sets["forgotten classes"][1].tolist() == [7]
    assert case.sets["siblings"][1].tolist() == [5, 6, 8, 9]
    assert len(case.sets["others"][1]) == 95
    assert 7 not in case.sets["retain"][1]
