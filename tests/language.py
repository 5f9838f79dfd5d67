"""Small language models of Hugging Face, made from a configuration: nothing is downloaded."""

import torch


def gpt2(dtype=torch.float64, **settings):
    """Layers of the kind ``Conv1D``, and a head that shares the embeddings' weight."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = {"n_positions": 12, "n_embd": 8, "n_layer": 2, "n_head": 2, **SETTINGS, **settings}
    return lively(GPT2LMHeadModel(GPT2Config(**config)), dtype)


def llama(dtype=torch.float64, **settings):
    """Grouped-query attention: four heads of queries, two of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "max_position_embeddings": 12, **SETTINGS, **settings}
    return lively(LlamaForCausalLM(LlamaConfig(**config)), dtype)


def lora(model, targets=("q_proj", "v_proj"), fresh=False, **settings):
    """The model with adapters, which change nothing yet if they are fresh."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = {"r": 2, "task_type": "CAUSAL_LM", **settings}
    wrapped = get_peft_model(model, LoraConfig(target_modules=list(targets), **settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name and not fresh:
            torch.nn.init.normal_(parameter, std=0.3)
    return wrapped.eval()


SETTINGS = {"vocab_size": 13, "bos_token_id": 0, "eos_token_id": 0}
TOKENS = torch.randint(0, 13, (5, 7), generator=torch.Generator().manual_seed(0))


def lively(model, dtype):
    """Fixed random weights that are not as small as those that training begins with, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    return model.to(dtype).eval()


QUESTIONS = [f"Where does {name} live?" for name in ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hal")]
ANSWERS = [f"In {town}, near the {what}." for town in ("Riga", "Oslo") for what in ("sea", "park", "lake", "zoo")]
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"


def tokenizer(chat=False):
    """A byte-pair tokenizer of the few texts here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["</s>", "<user>", "<assistant>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(QUESTIONS + ANSWERS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    if chat:
        fast.chat_template = CHAT
    return fast
