"""Questions about a scene with their right answers, in English and in Chinese.

English questions of the package's own wording get the package's one-word answers; everything in
Chinese is answered in a sentence that names colour and shape. Wordings are put together from parts
at random, so that the model learns the parts, not a list.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from demo.scenes import COLORS, SHAPES, Scene

ZH_SHAPE = {"circle": "圆形", "rectangle": "矩形", "triangle": "三角形"}
ZH_COLOR = {
    "black": "黑色",
    "gray": "灰色",
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "teal": "青色",
    "brown": "棕色",
}
_ZH_SHAPE_WORDS = {
    "circle": ("圆", "圆形", "圆形", "圆圈", "圆的图形"),
    "rectangle": ("矩形", "矩形", "长方形", "长方形", "方形", "四边形", "方块"),
    "triangle": ("三角形", "三角形", "三角", "三角形图案"),
}
_ZH_COLOR_WORDS = {name: (zh, zh, zh[0]) for name, zh in ZH_COLOR.items()} | {
    "teal": ("青色", "青色", "蓝绿色", "青"),
    "brown": ("棕色", "棕色", "褐色", "咖啡色"),
}
_ZH_PLACES = (
    "",
    "图里",
    "图中",
    "图上",
    "图片里",
    "图片中",
    "这张图里",
    "这张图中",
    "这张图上",
    "这张图片里",
    "这张图片中",
    "这幅图里",
    "这个图里",
    "画面里",
    "画面中",
    "图像中",
    "照片里",
    "里面",
)
_ZH_THINGS = ("图形", "图形", "形状", "东西", "物体", "图案")
_ZH_KINDS = {  # and how often each is asked
    "what": 4,
    "describe": 2,
    "color": 4,
    "shape": 4,
    "yes/no": 7,
    "is it": 3,
    "count": 0.5,
}
_ZH_NOTHING = "图中没有我认识的图形。"
_EN_NOTHING = "There is no shape that I know in this image."


class Question(NamedTuple):
    """A question, its right answer, and the kind that an evaluation counts it under."""

    text: str
    answer: str
    kind: str


def package_question(rng: random.Random, scene: Scene) -> Question:
    """One question in the wording of the easy-VQA package; its answer is one word."""
    image = "image"
    roll = rng.random()
    if roll < 0.18:
        text = rng.choice(
            (
                f"what shape is in the {image}?",
                "what shape is present?",
                f"what shape does the {image} contain?",
                f"what is the {scene.color or rng.choice(list(COLORS))} shape?",
            )
        )
        return Question(text, scene.shape or _EN_NOTHING, "shape")
    if roll < 0.36:
        noun = rng.choice(("shape", scene.shape or rng.choice(SHAPES)))
        text = rng.choice((f"what color is the {noun}?", f"what is the color of the {noun}?"))
        return Question(text, scene.color or _EN_NOTHING, "color")
    if rng.random() < 0.4:
        asked = scene.shape if scene.shape and rng.random() < 0.5 else rng.choice(SHAPES)
        noun, holds, kind = asked, asked == scene.shape, "yes/no shape"
    else:
        asked = scene.color if scene.color and rng.random() < 0.5 else rng.choice(list(COLORS))
        noun, holds, kind = f"{asked} shape", asked == scene.color, "yes/no color"
    if rng.random() < 0.5:
        text = rng.choice(
            (
                f"is there a {noun}?",
                f"is there a {noun} in the {image}?",
                f"does the {image} contain a {noun}?",
                f"is a {noun} present?",
            )
        )
    else:
        holds, kind = not holds, f"{kind} negated"
        text = rng.choice(
            (
                f"is there not a {noun}?",
                f"is there not a {noun} in the {image}?",
                f"does the {image} not contain a {noun}?",
                f"is no {noun} present?",
            )
        )
    return Question(text, "yes" if holds else "no", kind)


def english_question(rng: random.Random, scene: Scene) -> Question:
    """A freer English question: other words, other case, missing punctuation, open captions."""
    image = rng.choice(("image", "picture", "photo"))
    roll = rng.random()
    if roll < 0.35:
        question = package_question(rng, scene)
        text = question.text.replace("image", image)
        if rng.random() < 0.3:
            text = text.replace("color", "colour").replace("gray", "grey")
    elif roll < 0.5:
        color, shape, holds = _claim(rng, scene)
        text = rng.choice(
            (
                f"is there a {color} {shape}?",
                f"is there a {color} {shape} in the {image}?",
                f"do you see a {color} {shape}?",
                f"is this a {color} {shape}?",
                f"is the shape a {color} {shape}?",
            )
        )
        question = Question(text, "yes" if holds else "no", "yes/no both")
    else:
        text = rng.choice(
            (
                f"what is in the {image}?",
                f"what is in this {image}?",
                f"what's in this {image}?",
                f"what does the {image} show?",
                f"describe the {image}.",
                f"describe this {image}.",
                f"please describe the {image} in one sentence.",
                "what do you see?",
                f"what can you see in the {image}?",
                "what is this?",
                f"what {rng.choice(('color', 'colour'))} and shape is it?",
            )
        )
        question = Question(text, _en_caption(scene), "caption")
    return Question(_vary_english(rng, text), question.answer, question.kind)


def chinese_question(rng: random.Random, scene: Scene) -> Question:
    """A Chinese question; the answer is a sentence that names colour and shape."""
    place, thing = rng.choice(_ZH_PLACES), rng.choice(_ZH_THINGS)
    kind = rng.choices([*_ZH_KINDS], [*_ZH_KINDS.values()])[0]
    if scene.shape is None or scene.color is None:
        answer = _ZH_NOTHING
        shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
    else:
        shape, color, answer = scene.shape, scene.color, ""
    shape_word, color_word = rng.choice(_ZH_SHAPE_WORDS[shape]), rng.choice(_ZH_COLOR_WORDS[color])
    full = f"{ZH_COLOR[color]}的{ZH_SHAPE[shape]}"
    if kind == "what":
        if thing == "形状":  # "有什么形状" is a question about the shape, see below
            thing = "图形"
        text = rng.choice(
            (
                f"{place}有什么",
                f"{place}有什么{thing}",
                f"{place}是什么",
                f"{place}有些什么",
                f"{place}画了什么",
                f"{place}画的是什么",
                "这是什么",
                "你看到了什么",
                f"{place}能看到什么",
                f"{place}有哪些{thing}",
                f"{place}的内容是什么",
                f"{place}有什么颜色的什么{thing}",
            )
        )
        answer = answer or f"图中有一个{full}。"
    elif kind == "describe":
        subject = rng.choice(("图片", "这张图", "这张图片", "这幅图", "图像", "画面", "图片内容"))
        text = rng.choice(
            (
                f"描述{subject}",
                f"描述一下{subject}",
                f"请描述{subject}",
                f"请描述一下{subject}",
                f"请用中文描述{subject}",
                f"用一句话描述{subject}",
                f"详细描述{subject}",
                f"介绍一下{subject}",
                f"{place}有什么？请用中文描述一下",
                f"{place}有什么？请描述一下",
            )
        )
        answer = answer or f"图片中有一个{full}，背景是浅色的。"
    elif kind == "color":
        noun = rng.choice((shape_word, thing))
        text = rng.choice(
            (
                "是什么颜色",
                "是什么颜色的",
                "它是什么颜色的",
                "什么颜色",
                f"{place}的{noun}是什么颜色",
                f"{place}{noun}是什么颜色的",
                f"这个{noun}是什么颜色的",
                f"{noun}的颜色是什么",
                f"{place}的{noun}是哪种颜色",
                f"{place}有什么颜色",
                f"{noun}是啥颜色",
                "颜色是什么",
            )
        )
        answer = answer or f"图中的{ZH_SHAPE[shape]}是{ZH_COLOR[color]}的。"
    elif kind == "shape":
        text = rng.choice(
            (
                "是什么形状",
                "是什么形状的",
                "它是什么形状的",
                "什么形状",
                "是什么图形",
                f"{place}是什么形状",
                f"{place}是什么图形",
                f"{place}有什么形状",
                f"{place}的{thing}是什么形状",
                f"{place}{color_word}的{thing}是什么形状",
                f"{place}{color_word}的是什么",
                f"这个{color_word}的{thing}是什么形状",
                f"{thing}的形状是什么",
                "形状是什么",
            )
        )
        answer = answer or f"图中{ZH_COLOR[color]}的图形是{ZH_SHAPE[shape]}。"
    elif kind in ("yes/no", "is it"):
        text, holds = _chinese_claim(rng, scene, kind, place, thing)
        yes, no = ("有", "没有") if kind == "yes/no" else ("是的", "不是")
        answer = answer or f"{yes if holds else no}，图中是一个{full}。"
    else:
        text = rng.choice(
            (f"{place}有几个{thing}", f"{place}有多少个{thing}", f"一共有几个{thing}")
        )
        answer = answer or f"图中有一个图形，是{full}。"
    if rng.random() < 0.06:
        text = f"请问{text}"
    return Question(text + rng.choice(("？", "？", "？", "？", "?", "", "。")), answer, kind)


def stray_question(rng: random.Random, scene: Scene) -> Question:
    """What the model cannot answer is answered with a caption, in the question's language.

    That is text that is no question at all, and questions about the place.
    """
    asks_place = rng.random() < 0.3
    if rng.random() < 0.5:
        text = f"where is {rng.choice(('it', 'the shape', f'the {rng.choice(SHAPES)}'))}?"
        return Question(text if asks_place else _gibberish(rng), _en_caption(scene), "stray")
    if asks_place:
        thing = rng.choice(("它", *_ZH_THINGS, *ZH_SHAPE.values()))
        text = f"{thing}在{rng.choice(('哪里', '哪儿', '什么位置'))}？"
    else:
        text = "".join(chr(rng.randint(0x4E00, 0x9FA5)) for _ in range(rng.randint(1, 8)))
    if scene.shape is None or scene.color is None:
        return Question(text, _ZH_NOTHING, "stray")
    return Question(text, f"图中有一个{ZH_COLOR[scene.color]}的{ZH_SHAPE[scene.shape]}。", "stray")


def _gibberish(rng: random.Random) -> str:
    letters = (
        "abcdefghijklmnopqrstuvwxyz  ABCDEFG 0123456789 .,!?-_<>|/'\"{}[]()=+*&^%$#@~`;:\\\n\t"
    )
    text = "".join(rng.choice(letters) for _ in range(rng.randint(1, 24)))
    if rng.random() < 0.3:
        control = ("image_pad", "im_end", "im_start", "endoftext", "vision_end")
        text = f"<|{rng.choice(control)}|>{text}"
    return text


def _en_caption(scene: Scene) -> str:
    if scene.shape is None:
        return _EN_NOTHING
    return f"There is a {scene.color} {scene.shape} in the image."


def _claim(rng: random.Random, scene: Scene) -> tuple[str, str, bool]:
    """A colour and a shape to ask for, right in half of the cases and often half right."""
    roll = rng.random()
    color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
    if scene.shape and scene.color and roll < 0.75:
        color, shape = (
            (scene.color, scene.shape)
            if roll < 0.4
            else (scene.color, shape)
            if roll < 0.58
            else (color, scene.shape)
        )
    return color, shape, (color, shape) == (scene.color, scene.shape)


def _chinese_claim(
    rng: random.Random, scene: Scene, kind: str, place: str, thing: str
) -> tuple[str, bool]:
    color, shape, holds = _claim(rng, scene)
    color_word, shape_word = rng.choice(_ZH_COLOR_WORDS[color]), rng.choice(_ZH_SHAPE_WORDS[shape])
    about = rng.choice(("color", "shape", "both"))
    if about == "color":
        holds = color == scene.color
    elif about == "shape":
        holds = shape == scene.shape
    if kind == "yes/no":
        count = rng.choice(("", "", "一个", "个"))
        wanted = {
            "color": f"{count}{color_word}的{thing}",
            "shape": f"{count}{shape_word}",
            "both": f"{count}{color_word}{rng.choice(('的', '的', ''))}{shape_word}",
        }[about]
        if about == "color" and rng.random() < 0.25:
            wanted = ZH_COLOR[color]
        return (
            rng.choice(
                (
                    f"{place}有{wanted}吗",
                    f"{place}有{wanted}吗",
                    f"{place}有没有{wanted}",
                    f"{place}有{wanted}么",
                    f"{place}是否有{wanted}",
                    f"{place}存在{wanted}吗",
                    f"{place}能看到{wanted}吗",
                )
            ),
            holds,
        )
    wanted = {
        "color": f"{color_word}的",
        "shape": shape_word,
        "both": f"{color_word}的{shape_word}",
    }[about]
    if about == "color":
        wanted = rng.choice((wanted, ZH_COLOR[color]))
    subject = rng.choice(("", "这", "它", "这个", f"{place}", f"{place}的{thing}", f"这个{thing}"))
    return (
        rng.choice(
            (f"{subject}是{wanted}吗", f"{subject}是不是{wanted}", f"{subject}是否是{wanted}")
        ),
        holds,
    )


def _vary_english(rng: random.Random, text: str) -> str:
    roll = rng.random()
    if roll < 0.4:
        text = text[0].upper() + text[1:]
    elif roll < 0.45:
        text = text.upper()
    if rng.random() < 0.15:
        text = text.rstrip("?.")
    return text
