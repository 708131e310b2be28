"""gadcore chat [RUN_FOLDER] [--temperature T] [--max-tokens N] [--system TEXT]"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gadcore.errors import UserError
from gadcore.evaluate.trained import trained_student
from gadcore.text import visible

Messages = list[dict[str, str]]


def main(arguments: Sequence[str]) -> int:
    """Reads prompts from standard input, a line each, and prints what the student says. An empty line starts anew."""
    options = _parser().parse_args(arguments)
    student = trained_student(Path(options.run))
    system = student.system_prompt if options.system is None else options.system
    respond = _responder(student.folder, options.temperature, options.max_tokens)
    begin: Messages = [{"role": "system", "content": system}] if system else []
    messages = list(begin)
    for line in _lines():
        if not line.strip():
            messages = list(begin)
            continue
        messages.append({"role": "user", "content": line})
        said = []
        for piece in respond(messages):
            said.append(piece)
            print(visible(piece), end="", flush=True)
        print(flush=True)
        messages.append({"role": "assistant", "content": "".join(said)})
    return 0


def _lines() -> Iterator[str]:
    """Lines of standard input, after a prompt sign where a person types them."""
    person = sys.stdin.isatty()
    while True:
        if person:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.removesuffix("\n")


def _responder(folder: Path, temperature: float, max_tokens: int) -> Callable[[Messages], Iterator[str]]:
    """messages -> pieces of the student's next turn, sampled from softmax(logits / temperature)."""
    from threading import Thread

    import torch
    from transformers import GenerationConfig, TextIteratorStreamer

    from gadcore.config.device import best_device, quiet
    from gadcore.data.template import ChatTemplate
    from gadcore.models.loading import load_causal_lm, load_tokenizer

    quiet()
    device = best_device()
    tokenizer = load_tokenizer(str(folder))
    model: Any = load_causal_lm(str(folder), "float32" if device.type == "cpu" else "bfloat16", device)
    template = ChatTemplate(tokenizer)
    greedy = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature}
    sampling = GenerationConfig(
        max_new_tokens=max_tokens,
        eos_token_id=template.end_id,
        pad_token_id=template.end_id,
        top_k=0,
        top_p=1.0,
        **greedy,
    )

    def respond(messages: Messages) -> Iterator[str]:
        ids = torch.tensor([template.prompt_ids(messages)], device=device)
        streamer: Any = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "generation_config": sampling}
        worker = Thread(target=model.generate, kwargs={**given, "streamer": streamer}, daemon=True)
        worker.start()
        yield from streamer
        worker.join()

    return respond


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"chat: {message}; see chat --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gadcore chat", description="Talk to a student; an empty line starts a new conversation.")
    parser.add_argument("run", metavar="RUN_FOLDER", nargs="?", default="runs/latest", help="or a model's folder")
    parser.add_argument("--temperature", type=float, default=0.7, help="default 0.7; 0: greedy")
    parser.add_argument("--max-tokens", type=int, default=512, help="of a response; default 512")
    parser.add_argument("--system", help="a system message; default the one of the run's settings")
    return parser
