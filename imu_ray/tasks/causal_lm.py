"""Causal language models: the tokens of an answer, of a last message or of a whole text are predicted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from typing_extensions import Self

from imu_ray.config import ForgetSetConfig
from imu_ray.data import Fields
from imu_ray.data.columns import OPTIONAL
from imu_ray.errors import ConfigError
from imu_ray.influence.gradients import IGNORE
from imu_ray.tasks.base import UnusableError
from imu_ray.tasks.sequence import Ids, SequenceTask

PARAPHRASED, PERTURBED = OPTIONAL


@dataclass(frozen=True)
class CausalLMTask(SequenceTask):
    """Token cross-entropy of a causal language model; a sample's tokens come from its texts.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
    """

    tokenizer: Any = None

    @classmethod
    def fields(cls, config: ForgetSetConfig) -> Fields:
        """A conversation, a text, or a question and its answer."""
        for name, column in (("messages", config.messages_column), ("text", config.text_column)):
            if column is not None:
                return {name: column}
        names = ("question", "answer", PARAPHRASED, PERTURBED)
        return {name: getattr(config, f"{name}_column") for name in names}

    @classmethod
    def reader(cls, model: nn.Module, config: ForgetSetConfig) -> Self:
        """The task with the tokenizer that is named, or that lies with the model."""
        if "{question}" not in config.prompt:
            raise ConfigError(f"forget_set.prompt is {config.prompt!r}; expected a text with {{question}} in it")
        tokenizer = load_tokenizer(config.tokenizer or getattr(model, "name_or_path", None))
        if config.messages_column is not None and not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "forget_set.messages_column is set, but the tokenizer has no chat template; expected one; name the "
                "tokenizer of a chat model in forget_set.tokenizer, or use question_column and answer_column"
            )
        return cls(config, tokenizer=tokenizer)

    def encode(self, value: Any) -> tuple[Ids, Ids]:
        """Tokens of a row and their labels, ``IGNORE`` for what is not predicted."""
        if isinstance(value, Mapping):
            return self._joined(self._prompt(value["question"]), " " + _text(value["answer"], "answer"))
        if self.config.messages_column is None:
            return self._joined([], _text(value, "text"))
        before, whole = self._conversation(value)
        if whole[: len(before)] != before:
            raise UnusableError("the chat template changes what stands before the last message when it is added")
        return _labelled(before, whole[len(before) :])

    def other_answers(self, value: Any, kind: str) -> list[tuple[Ids, Ids]]:
        """Tokens and labels of a row with other answers, ``PARAPHRASED`` or ``PERTURBED``; none of a row without.

        Raises:
            UnusableError: they are no text and no list of texts.
        """
        found = value.get(kind) if isinstance(value, Mapping) else None
        if not isinstance(found, str | list | None):
            raise UnusableError(f"its {kind} is no list of texts")
        answers = [found] if isinstance(found, str) else found or []
        return [self.encode({**value, "answer": answer}) for answer in answers]

    def prompt_and_answer(self, value: Any) -> tuple[list[int], str]:
        """What a model reads of a usable row before it answers, and the right answer, or the last message."""
        if isinstance(value, Mapping):
            return self._prompt(value["question"]), value["answer"]
        return self._conversation(value)[0], str(value[-1]["content"])

    def _prompt(self, question: Any) -> list[int]:
        prompt = self.config.prompt.replace("{question}", _text(question, "question"))
        return list(self.tokenizer(prompt)["input_ids"])

    def _joined(self, prompt: list[int], answer: str) -> tuple[Ids, Ids]:
        """The tokens of a prompt, then those of an answer and of its end; each text is split by itself."""
        end = self.tokenizer.eos_token_id
        found = self.tokenizer(answer, add_special_tokens=not prompt)["input_ids"]
        return _labelled(prompt, found + ([] if end is None or found[-1:] == [end] else [end]))

    def _conversation(self, messages: Any) -> tuple[list[int], list[int]]:
        """Tokens of what stands before the last message of a conversation, and of the whole."""
        if not isinstance(messages, list) or len(messages) < 2:
            raise UnusableError("its messages are no list of two or more")

        def tokens(part: list[Any], more: bool) -> list[int]:
            text = self.tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=more)
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        try:
            return tokens(messages[:-1], True), tokens(messages, False)
        except Exception as error:  # a template raises anything
            raise UnusableError(f"the chat template does not take its messages ({type(error).__name__})") from None


def load_tokenizer(folder: str | None) -> Any:
    """A Hugging Face tokenizer from a folder, without running code from it.

    Raises:
        ConfigError: the extra is not installed, or there is no tokenizer.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ConfigError("task 'causal_lm' needs transformers; expected the extra: pip install imu-ray[hf]") from None
    if not folder:
        raise ConfigError("the model does not say where its tokenizer is; expected its folder in forget_set.tokenizer")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds
        raise ConfigError(
            f"no tokenizer can be read from {folder!r} ({type(error).__name__}); expected a folder that "
            "tokenizer.save_pretrained wrote; name it in forget_set.tokenizer"
        ) from None


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise UnusableError(f"its {what} is no text")
    return value


def _labelled(prompt: list[int], answer: list[int]) -> tuple[Ids, Ids]:
    """Tokens, and labels for those of the answer."""
    labels = [IGNORE] * len(prompt) + answer
    return np.array(prompt + answer, np.int64), np.array(labels, np.int64)
