"""Who runs in the next step: no model, no thread, milliseconds."""

from __future__ import annotations

import random
from dataclasses import dataclass

from qwenvl_app.engine.scheduler import Scheduler, Step


@dataclass(eq=False)
class Job:
    prompt_length: int = 10
    limit: int = 10
    patches: int = 4
    prefix_key: bytes | None = None
    seen: bool = False
    computed: int = 0
    boundary: int = 0

    @property
    def inputs(self) -> Job:
        """What the scheduler looks at of a sequence's inputs is here too."""
        return self

    @property
    def reserved(self) -> int:
        return self.prompt_length + self.limit


def scheduler(slots=4, budget=10_000, chunk=16, patches=64, depth=4) -> Scheduler:
    return Scheduler(slots, budget, chunk, patches, depth)


def carry_out(s: Scheduler, depth: int = 4) -> Step:
    """A step: what was planned, and a token for all whose prompt is complete."""
    step = s.next_step()
    if step.vision and step.vision.last == depth:
        for job in step.vision.jobs:
            job.seen = True
    for job, width in step.prefill:
        assert job.seen
        assert 0 < width <= job.prompt_length - job.computed
        job.computed += width
    for job in s.complete():
        assert job.computed >= job.prompt_length
        job.computed += 1
    return step


def test_a_step_ends_where_a_prefill_has_to():
    """There a copy of what a recurrent layer has read is made, which can't be cut afterwards."""
    s = scheduler(chunk=8)
    job = Job(prompt_length=20, boundary=11, seen=True)
    s.waiting.append(job)
    s.fill_slots()
    widths = []
    while job.computed < 20:
        step = carry_out(s)
        widths.append(step.prefill[0][1])
    assert widths == [8, 3, 8, 1]


def test_first_come_first_served_up_to_the_slots():
    s = scheduler(slots=2)
    jobs = [Job() for _ in range(3)]
    s.waiting.extend(jobs)
    assert s.fill_slots() == jobs[:2]
    assert s.fill_slots() == []
    s.remove(jobs[0])
    assert s.fill_slots() == [jobs[2]]


def test_short_prompts_share_a_step_from_picture_to_prefill():
    s = scheduler(chunk=64)
    jobs = [Job(prompt_length=n) for n in (10, 12, 15)]
    s.waiting.extend(jobs)
    s.fill_slots()
    step = carry_out(s)
    assert step.vision.jobs == jobs
    assert (step.vision.first, step.vision.last) == (0, 4)
    assert step.prefill == [(jobs[0], 10), (jobs[1], 12), (jobs[2], 15)]
    assert [job.computed for job in jobs] == [11, 13, 16]  # and each has its second token


def test_a_prefill_is_a_rectangle_within_the_chunk():
    s = scheduler(chunk=32)
    jobs = [Job(prompt_length=n, seen=True) for n in (5, 16, 5, 40)]
    s.waiting.extend(jobs)
    s.fill_slots()
    assert carry_out(s).prefill == [(jobs[0], 5), (jobs[1], 16)]
    assert s.next_step().prefill == [(jobs[2], 5)]


def test_a_long_prompt_comes_in_chunks_and_the_others_go_on():
    s = scheduler(chunk=16)
    short, long = Job(prompt_length=4, seen=True), Job(prompt_length=40, seen=True)
    s.waiting.extend([short, long])
    s.fill_slots()
    widths = []
    for _ in range(4):
        before = short.computed
        widths += [width for job, width in carry_out(s).prefill if job is long]
        assert short.computed > before
    assert widths == [16, 16, 8]


def test_a_large_picture_goes_through_the_tower_over_several_steps():
    s = scheduler(patches=64, depth=4)
    large, small = Job(patches=128), Job(patches=8)
    s.waiting.extend([large, small])
    s.fill_slots()
    spans = []
    for _ in range(3):
        step = carry_out(s)
        spans.append((step.vision.jobs, step.vision.first, step.vision.last))
    assert spans == [([large], 0, 2), ([large], 2, 4), ([small], 0, 4)]


def test_one_that_leaves_in_the_middle_of_the_tower_does_not_hold_up_the_rest():
    s = scheduler(patches=64, depth=4)
    large, small = Job(patches=128), Job(patches=8)
    s.waiting.extend([large, small])
    s.fill_slots()
    carry_out(s)
    s.remove(large)
    step = s.next_step()
    assert (step.vision.jobs, step.vision.first, step.vision.last) == ([small], 0, 4)


def test_nobody_is_overtaken_for_ever():
    """A slot moved into a hole came before older ones: a large request never got its turn."""
    s = scheduler(slots=6, chunk=16, patches=16)
    s.waiting.extend(Job() for _ in range(5))
    large = Job(prompt_length=48, patches=32)
    s.waiting.append(large)
    for _ in range(40):
        s.fill_slots()
        carry_out(s)
        if large.computed >= 48:
            return
        for job in [job for job in s.running if job.computed > job.prompt_length]:
            s.remove(job)
            s.waiting.append(Job())
    raise AssertionError(f"{large.computed} of 48 after 40 steps")


def test_slots_have_no_holes():
    s = scheduler()
    a, b, c, d = jobs = [Job(seen=True) for _ in range(4)]
    s.waiting.extend(jobs)
    s.fill_slots()
    assert s.remove(b) == (3, 1)
    assert s.running == [a, d, c]
    assert s.remove(c) is None
    assert s.remove(a) == (1, 0)
    assert s.running == [d]


def test_the_rectangle_stays_within_the_budget():
    s = scheduler(budget=100)
    jobs = [Job(20, 10), Job(20, 10), Job(20, 30), Job(5, 5)]
    s.waiting.extend(jobs)
    assert s.fill_slots() == jobs[:2]  # the third would make it 3 slots of 50
    s.remove(jobs[0])
    assert s.fill_slots() == [jobs[2]]
    assert s.fill_slots() == []  # 3 slots of 50 again: nobody overtakes


def test_a_question_about_a_picture_that_is_just_being_looked_at_waits_a_moment():
    s = scheduler(chunk=64)
    first, second, other = Job(prefix_key=b"x"), Job(prefix_key=b"x"), Job(prefix_key=b"y")
    s.waiting.extend([first, second, other])
    assert s.fill_slots() == [first]
    carry_out(s)
    assert s.fill_slots() == [second, other]


def test_whatever_comes_and_goes_everybody_ends():
    rng = random.Random(1)
    for _ in range(50):
        depth = rng.randint(1, 5)
        s = scheduler(rng.randint(1, 8), 400, rng.randint(1, 40), rng.randint(1, 80), depth)
        todo = [
            Job(
                rng.randint(2, 60),
                rng.randint(1, 30),
                rng.randint(1, 200),
                rng.choice((None, b"a", b"b")),
            )
            for _ in range(40)
        ]
        ended = 0
        for _step in range(5000):
            if todo and rng.random() < 0.3:
                s.waiting.append(todo.pop())
            s.fill_slots()
            assert len(s.running) <= s.slots
            assert len(s.running) * max((j.reserved for j in s.running), default=0) <= 400
            carry_out(s, depth)
            for job in [*s.running, *s.waiting]:
                if job.computed >= job.reserved or rng.random() < 0.002:
                    s.remove(job)
                    ended += 1
            if ended == 40:
                break
        assert ended == 40
        assert not s.running


def sharing(budget: int = 100, patches: int = 8) -> Scheduler:
    """A patch takes two tokens of the budget while it is in the tower, then half of one."""
    return Scheduler(4, budget, 16, patches, 4, cost=(2.0, 0.5))


def test_who_is_alone_needs_the_tower_first_and_then_its_tokens():
    """On a 24 GB card both of the largest request, at once, did not fit; but they never are."""
    s = sharing()
    assert s.longest(40) == 100 - 20  # what the tower made of it is kept until it is prefilled
    assert s.longest(41) == 0  # too large for the tower
    large = Job(prompt_length=70, limit=10, patches=40)
    small = Job(prompt_length=2, limit=2, patches=1, seen=True)
    s.waiting.extend([large, small])
    assert s.fill_slots() == [large]
    large.seen, large.computed = True, 70
    assert s.fill_slots() == []  # two slots of 80
    s.remove(large)
    assert s.fill_slots() == [small]


def test_a_picture_waits_for_the_memory_that_the_tower_needs():
    s = sharing()
    first = Job(prompt_length=20, limit=10, patches=10)
    s.waiting.append(first)
    s.fill_slots()
    first.seen, first.computed = True, 20
    second, third = Job(limit=20, patches=20), Job(limit=20, patches=15)
    s.waiting.append(second)
    assert s.fill_slots() == []  # two slots of 30, 40 for the tower, 10 for what it makes: 110
    s.waiting.clear()
    s.waiting.append(third)
    assert s.fill_slots() == [third]  # 60 + 30 + 7.5


def test_the_cache_may_hold_what_the_pictures_leave():
    """It held on to what it had once needed, and the tower came beside that."""
    s = sharing(budget=200)
    assert s.cache_limit() == 200
    old = [Job(prompt_length=20, limit=10, patches=10, seen=True, computed=20) for _ in range(2)]
    s.waiting.extend([*old, Job(prompt_length=20, limit=10, patches=30)])
    s.fill_slots()
    new = s.running[2]
    assert s.cache_limit() == 200 - 60 - 15  # the tower, and what it makes
    new.seen = True
    assert s.cache_limit() == 200 - 15
    new.computed = 20
    assert s.cache_limit() == 200


def test_who_is_alone_may_have_no_tokens_while_its_picture_is_in_the_tower():
    s = sharing(budget=100)
    job = Job(prompt_length=70, limit=10, patches=40)
    s.waiting.append(job)
    s.fill_slots()
    assert s.cache_limit() == 0
    job.seen = True
    assert s.cache_limit() == job.reserved


def test_tower_and_tokens_together_stay_within_the_budget():
    rng = random.Random(7)
    s, left = sharing(budget=300, patches=16), 60
    while left or s.running or s.waiting:
        if left and rng.random() < 0.4:
            left -= 1
            job = Job(rng.randint(1, 60), rng.randint(1, 30), patches=rng.choice((1, 4, 16, 60)))
            assert job.reserved <= s.longest(job.patches)
            s.waiting.append(job)
        s.fill_slots()
        step = carry_out(s)
        inside = step.vision.jobs if step.vision else []
        rectangle = len(s.running) * max((job.computed for job in s.running), default=0)
        tower = 2 * sum(job.patches for job in inside)
        features = sum(
            job.patches / 2 for job in s.running if job.seen and job.computed < job.prompt_length
        )
        assert rectangle + tower + features <= 300
        assert (
            len(s.running) * max((job.computed for job in s.running), default=0) <= s.cache_limit()
        )
        for job in [job for job in s.running if job.computed >= job.reserved]:
            s.remove(job)
