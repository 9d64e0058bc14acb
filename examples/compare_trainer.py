"""A script with the Trainer of Hugging Face, turned into a comparison: the changed lines are marked.

    python examples/compare_trainer.py

Two minutes on two cores; needs largemargin[lab,transformers]. A small BERT reads the 64 pixels of a digit as a text of 17 words. It learns
little of them: four in ten test digits are right.
"""

import sys

import torch
from sklearn.datasets import load_digits
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from largemargin import lab  # changed


def train(run):  # changed
    run.seed_everything()  # changed
    pixels, labels = load_digits(return_X_y=True)
    rows = [{"input_ids": torch.tensor(row, dtype=torch.long), "labels": int(label)} for row, label in zip(pixels, labels, strict=True)]
    config = BertConfig(  # type: ignore[call-arg]
        vocab_size=17,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        num_labels=10,
    )
    arguments = TrainingArguments(
        output_dir=str(run.folder / "trainer"),  # changed
        seed=run.seed,  # changed
        num_train_epochs=15,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        use_cpu=run.device.type == "cpu",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(
        BertForSequenceClassification(config),
        arguments,
        train_dataset=rows[:1200],
        compute_loss_func=lambda outputs, labels, **_: run.loss(outputs.logits, labels),  # changed
    )
    trainer.train()
    found = trainer.predict(rows[1200:])  # type: ignore[arg-type]
    return run.score(found.predictions, found.label_ids)  # changed


def main(out="runs/trainer", seeds=5):
    result = lab.compare(train, losses=["softmax", "large_margin"], seeds=range(seeds), out=out)  # changed
    print(result)
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
