"""Text from any OpenAI-compatible endpoint: `collect` for teacher responses, and `ask_all` for everything else.

    from gadcore.teacher.client import ask_all
    from gadcore.teacher.settings import Budget, Endpoint      # sections of a command's settings
    from gadcore.teacher.store import ChatRequest, ReplyStore

    requests = [ChatRequest(messages, {"temperature": 0, "max_completion_tokens": 16}) for messages in conversations]
    with ReplyStore(path, endpoint.address) as store:
        tally = ask_all(endpoint, requests, store)             # only what the store does not hold is asked
        replies = [store.get(store.key(request, endpoint.model)) for request in requests]    # Reply, or None

Nothing that was answered is asked again: a reply is on disk (fsync) before it counts, in a JSONL file that only grows,
under a hash of (messages, model, parameters, address). A request that was in flight when the process was killed has no
answer on disk; the next run asks it again.

settings.py   Endpoint, Budget and the settings of `collect`; imports neither an HTTP client nor torch
reply.py      Reply, read out of a server's words and checked
secret.py     the key, taken out of whatever comes back
store.py      ChatRequest and its key, ReplyStore
transport.py  one POST, bounded in time and size
limits.py     requests and tokens per minute; the budget
client.py     ask_all()
prompts.py    prompts out of the sources of training data, and of plain text
dataset.py    train.jsonl and eval.jsonl out of the store
card.py       the data card
command.py    python -m gadcore.run collect
"""
