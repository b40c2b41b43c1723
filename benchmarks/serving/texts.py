"""What stands beside the tables and below the plots; with ``format``'s fields for a ``Size``."""

from __future__ import annotations

RATES = """
Whole answers, the medians of paired blocks. In brackets: ours over it, the median of the pairs.
Long answers have {size.tokens} tokens, very long ones {size.longest}, which are streamed. All but
`generate` is over HTTP. The replaced service does one request after another: more clients wait.
"""

STREAMS = """
{size.tokens} tokens, streamed. The replaced service does not stream: its first token is its whole
answer.
"""

ARRIVALS = """
Requests come independently of one another (Poisson), {size.arriving} of them, at a share of
what each server can do with the same mix of lengths ({lengths} tokens) under as many clients as
above. All get the same requests. The gaps scale with what a server can do, so that a slow one takes
longer and builds up the same queue. A picture of its own each.
`max_waiting` is raised for ours, since the others queue without a bound.
"""

PICTURES = """
A JPEG, one client, one token; the checkpoint scales down what is above a megapixel. In brackets:
ours over it, so that less than 1 is faster.
"""

COSTS = """
CPU time of the server's processes, over all numbers of clients. Memory is resident, the most that
was seen; what processes share counts for each.
"""

SLOTS = """
Ours with `max_concurrency` so high, {most} clients at once, {tokens} tokens each, streamed.
"""

COST_OF_CLIENTS = """
Against clients. The rate of long answers rises until the slots are full, four here, since one step
decodes a token for each of them; more clients only wait. easy-VQA rises less: most of a request is
its picture and its prompt, which sharing a step makes little cheaper. One request at a time is
flat.
"""

COST_OF_FIRST = """
The wait against clients. Up to the number of slots the first token comes later by the prefills of
the others. Beyond it a client waits for somebody's whole answer, so the wait grows by steps of an
answer's length, while the time of a token stays that of a full step.
"""

COST_OF_TOKENS = """
Against tokens, one client. A straight line is a cost per token that does not depend on where the
token stands: its weights are read anew each time. A bend upwards is attention, whose keys and
values grow with the answer.
"""

COST_OF_PIXELS = """
Against pixels, one client. Up to a megapixel the vision tower and the prefill grow with the
picture's tokens, attention in the tower with their square. Beyond it the picture is scaled down
first: what still grows is decoding the JPEG and resizing, in proportion to its pixels.
"""

COST_OF_LOAD = """
Against load. The wait for the first token grows about as 1 / (1 - load), as in any queue. Who
answers one request at a time starts from a whole answer's time; who has slots, from a prefill's.
"""

COST_OF_SLOTS = """
Against slots, all clients at once. More rows share a step, so the rate rises, ever less: attention
and sampling are each row's own. A token takes longer in a fuller step; the first one comes sooner,
since fewer wait for a slot.
"""
