"""TRL: its trainer for supervised fine-tuning has a fused softmax loss of its own; it trains with ours where it is told to, and says so."""

import contextlib
import copy

import pytest
import torch

from devices import DEVICE
from largemargin.integrations.transformers import LargeMarginLoss, fuse_large_margin_loss
from largemargin.lab._torchvision import import_torchvision

with contextlib.suppress(ImportError):
    import_torchvision()  # which transformers imports where it is installed
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.usefixtures("device"),  # where TRL trains
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*compute_loss_func.* is deprecated:FutureWarning"),
]

VOCABULARY = 64
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0, **SIZES)
    return transformers.LlamaForCausalLM(config)


def rows() -> list[list[int]]:
    return [[1, *((torch.arange(9 + i) * (i + 3)) % 60 + 3).tolist()] for i in range(6)]


class Collected:
    """The tokens of rows of unlike length, padded; labels are the tokens, -100 where there is none."""

    def __call__(self, examples):
        longest = max(len(example["input_ids"]) for example in examples)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for example in examples:
            ids, missing = example["input_ids"], longest - len(example["input_ids"])
            batch["input_ids"].append(ids + [0] * missing)
            batch["attention_mask"].append([1] * len(ids) + [0] * missing)
            batch["labels"].append(ids + [-100] * missing)
        return {name: torch.tensor(value) for name, value in batch.items()}


def sft_trainer(model, folder, *, loss=None, plain_compute_loss=False, **options):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    kind = trl.SFTTrainer
    if plain_compute_loss:
        kind = type("LargeMarginTrainer", (trl.SFTTrainer,), {"compute_loss": transformers.Trainer.compute_loss})
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", bos_token="1", eos_token="2", unk_token="0")
    args = trl.SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=3, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant",
        use_cpu=DEVICE.type == "cpu", bf16=False, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True, seed=0,
        max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, **options,
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"input_ids": rows()})
    return kind(
        model, args, train_dataset=data, eval_dataset=data, data_collator=Collected(), processing_class=tokenizer, compute_loss_func=loss
    )


def losses_of(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_fused_model_in_the_trainer_of_trl_is_refused_by_name(tmp_path):
    trainer = sft_trainer(fuse_large_margin_loss(llama()), tmp_path)
    with pytest.raises(ValueError, match=r"fused_lm_head=True.*TRL.*compute_loss = transformers\.Trainer\.compute_loss"):
        trainer.train()


@pytest.mark.parametrize("adapter", [False, True])
def test_a_fused_model_trains_by_the_line_that_the_error_names(adapter, tmp_path):
    model = llama()
    if adapter:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(
            model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
    plain = copy.deepcopy(model)
    trainer = sft_trainer(fuse_large_margin_loss(model), tmp_path, plain_compute_loss=True)
    empty = []
    model.register_forward_hook(lambda module, args, outputs: empty.append(outputs.logits.numel() == 0))
    found = losses_of(trainer)
    assert len(found) == 3 and all(empty)
    expected = losses_of(sft_trainer(plain, tmp_path, plain_compute_loss=True, loss=LargeMarginLoss(causal=True)))
    assert found == pytest.approx(expected, rel=1e-5)
    for weight, same in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, same, rtol=1e-4, atol=1e-6)
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_loss_of_logits_in_the_trainer_of_trl_is_ours(tmp_path):
    model = llama()
    plain = copy.deepcopy(model)
    found = losses_of(sft_trainer(model, tmp_path, loss=LargeMarginLoss(causal=True)))
    expected = losses_of(sft_trainer(plain, tmp_path, plain_compute_loss=True, loss=LargeMarginLoss(causal=True)))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*label_smoothing_factor.* is deprecated:FutureWarning")
def test_label_smoothing_of_trl_is_not_ignored(tmp_path):
    trainer = sft_trainer(llama(), tmp_path, loss=LargeMarginLoss(causal=True), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0"):
        trainer.train()


def test_a_forward_pass_that_asks_for_log_probabilities_is_refused():
    # as TRL calls any model, without TRL
    model, tokens = fuse_large_margin_loss(llama()).train(), torch.arange(8).view(1, 8)
    for training in (True, False):
        with pytest.raises(ValueError, match=r"fused_lm_head=True.*TRL"):
            model.train(training)(input_ids=tokens, labels=tokens, fused_lm_head=True)
    assert model.train()(input_ids=tokens, labels=tokens).logits.numel() == 0
