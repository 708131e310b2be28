"""What every side of the suite `step` gets: the same models, prompts, teacher responses, lengths and settings.

A problem lies in a folder: problem.json beside the student's and the discriminator's model directories, which problems
share. Writing one needs the models; the sides only read it.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gadcore.config.data import DataSettings
from gadcore.config.settings import AlgorithmSettings, Config, ScheduleSettings, VLLMRollout
from gadcore.data.batches import build_prompts
from gadcore.data.groups import Group, Prompt, Response
from gadcore.data.rows import load_rows
from gadcore.data.template import ChatTemplate
from gadcore.models.loading import load_discriminator, load_tokenizer, save_model

TEMPERATURE = 0.8
SPECIAL = ("<unk>", "<pad>", "<|end|>", "<|user|>", "<|assistant|>")
# A turn is <|role|> words <|end|>; as a word is a token, its length in tokens is known.
TURNS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
TURN_TOKENS = 3

# SmolLM2-135M's.
SHAPE = dict(
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    intermediate_size=1536,
    vocab_size=49152,
    max_position_embeddings=8192,
)
TINY = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=96,
    vocab_size=320,
    max_position_embeddings=256,
)


@dataclass(frozen=True)
class Problem:
    """One measurement's inputs.

    student, discriminator: model directories. groups: prompts with the teacher's responses, `prompts` of them a step.
    max_prompt, max_response: in tokens. forced: every sample has max_response tokens; else it may end by itself.
    groups_at_once: groups in a forward and backward pass, for every side: as many as memory holds.
    """

    student: str
    discriminator: str
    groups: list[dict[str, Any]]
    prompts: int
    samples: int
    max_prompt: int
    max_response: int
    forced: bool
    groups_at_once: int
    temperature: float = TEMPERATURE

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Problem:
        return cls(**json.loads(path.read_text()))

    @property
    def steps(self) -> int:
        """Steps that there are prompts for."""
        return len(self.groups) // self.prompts

    @property
    def algorithm(self) -> AlgorithmSettings:
        return AlgorithmSettings()

    def batch(self, step: int) -> list[Group]:
        """The groups of a step, without samples."""
        return [_group(row) for row in self.groups[step * self.prompts : (step + 1) * self.prompts]]

    def config(self) -> Config:
        """gadcore's settings: its defaults but for sizes."""
        # What a cut of `groups_at_once` groups can hold at most, the teacher's responses included.
        tokens = self.max_prompt + (self.samples + 1) * self.max_response
        return Config(
            data=DataSettings(max_prompt_tokens=self.max_prompt, max_response_tokens=self.max_response),
            rollout=VLLMRollout(group_size=self.samples, temperature=self.temperature),
            schedule=ScheduleSettings(batch_size=self.prompts, micro_batch_tokens=self.groups_at_once * tokens),
        )

    def template(self) -> ChatTemplate:
        return ChatTemplate(load_tokenizer(self.student))


def _group(row: dict[str, Any]) -> Group:
    prompt = Prompt(row["index"], tuple(row["messages"]), tuple(row["prompt_ids"]))
    return Group(prompt, Response(row["teacher"], tuple(row["teacher_ids"]), row["finished"]))


def _row(group: Group) -> dict[str, Any]:
    return {
        "index": group.prompt.index,
        "messages": list(group.prompt.messages),
        "prompt_ids": list(group.prompt.token_ids),
        "teacher": group.teacher.text,
        "teacher_ids": list(group.teacher.token_ids),
        "finished": group.teacher.finished,
    }


# -- making them ------------------------------------------------------------------------------------------------------


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Words w0, w1, .. of a token each, and a chat template."""
    words = [*SPECIAL, *(f"w{i}" for i in range(vocabulary - len(SPECIAL)))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|end|>",
        padding_side="left",
        chat_template=TURNS,
    )


def random_models(folder: Path, shape: dict[str, int]) -> tuple[Path, Path]:
    """Directories of a random student of this shape and of a discriminator with its weights and a random head."""
    student = folder / "student"
    tokenizer = word_tokenizer(shape["vocab_size"])
    torch.manual_seed(0)
    settings: dict[str, Any] = shape
    config = LlamaConfig(
        **settings,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    save_model(LlamaForCausalLM(config), tokenizer, student)
    return student, discriminator_of(str(student), folder / "discriminator")


def discriminator_of(student: str, path: Path) -> Path:
    """A directory with the student's weights and a random scalar head, the same for every side."""
    tokenizer = load_tokenizer(student)
    end_id = ChatTemplate(tokenizer).end_id
    cpu = torch.device("cpu")
    model = load_discriminator(student, "float32", device=cpu, seed=0, end_id=end_id, tokenizer=tokenizer)
    save_model(model, tokenizer, path)
    return path


def random_groups(student: Path, prompt_lengths: list[int], response: int) -> list[dict[str, Any]]:
    """Random words: a prompt of every length, rendered by the chat template, and a cut teacher response to it."""
    template = ChatTemplate(load_tokenizer(str(student)))
    rng = random.Random(0)
    words = [f"w{i}" for i in range(len(template.tokenizer) - len(SPECIAL))]
    groups = []
    for index, length in enumerate(prompt_lengths):
        messages = ({"role": "user", "content": " ".join(rng.choices(words, k=length - TURN_TOKENS))},)
        prompt = Prompt(index, messages, template.prompt_ids(messages))
        text = " ".join(rng.choices(words, k=response))
        teacher = Response(text, template.response_ids(text, finished=False), False)
        if (len(prompt.token_ids), len(teacher.token_ids)) != (length, response):
            raise RuntimeError("the tokenizer of the random model does not give a token a word")
        groups.append(_row(Group(prompt, teacher)))
    return groups


def real_groups(student: str, data: Path, count: int, max_prompt: int, max_response: int) -> list[dict[str, Any]]:
    """The first rows whose prompt fits; teacher responses are cut at max_response tokens, as samples are."""
    template = ChatTemplate(load_tokenizer(student))
    settings = DataSettings(max_prompt_tokens=max_prompt, max_response_tokens=max_response, long_prompt="drop")
    groups, _ = build_prompts(load_rows(str(data), {}, limit=4 * count), template, settings)
    if len(groups) < count:
        raise RuntimeError(f"{data} has {len(groups)} prompts of at most {max_prompt} tokens, {count} are needed")
    return [_row(group) for group in groups[:count]]
