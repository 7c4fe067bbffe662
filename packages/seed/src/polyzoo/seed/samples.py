"""Training samples of the language model: ids, and which of them count in the loss.

The formats are those of the published data code (section 4.5 of the specification): prompt and
answer are tokenised apart and joined, answers end in a full stop, and user turns do not count.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polyzoo.core.errors import DataError
from polyzoo.seed.vocabulary import ImageVocabulary

IGNORED = -100
USER, ASSISTANT = "USER: ", "\nASSISTANT:"

DRAW_REQUESTS = (
    "Please show me a picture of {}",
    "Please design an image of {}",
    "Please produce a photo of {}",
    "Please generate an image of {}",
    "Please draw a painting of {}",
    "I'd like to see a drawing of {}",
    "I'd love to see an illustration of {}",
    "I'd like to view an image of {}",
    "I want to see a picture of {}",
    "I would like to see a photo of {}",
    "Show me a photo of {}",
    "Generate a picture of {}",
    "Show me a photograph of {}",
    "Generate an image of {}",
    "Generate an image: {}",
    "Generate a picture: {}",
    "Generate a painting: {}",
    "Generate a photograph: {}",
    "Show me a photograph: {}",
    "Draw a picture: {}",
)
"""What a picture is asked for with; {} is the caption."""
DRAW_ANSWERS = (
    "Here is a picture.",
    "I have designed an image.",
    "Here is a photo.",
    "I have generated an image.",
    "Here's a painting.",
    "Here's a drawing.",
    "Enjoy this illustration.",
    "Take a look at this image.",
    "Here is a picture for you.",
    "I have created a photo.",
    "Enjoy this photo.",
    "I have generated a picture.",
    "Here is a photograph.",
    "Here's an image.",
    "Certainly, here's an image.",
    "Absolutely, here is a painting.",
    "Sure, here is a picture.",
    "Of course, here is a photo.",
    "Certainly, please enjoy this picture.",
    "Sure, please enjoy this illustration.",
)
"""What is said before the picture."""
_QUESTION = re.compile(r"Question:")
_ANSWER = re.compile(r"Answer:")


@dataclass(frozen=True)
class Sample:
    """One training sequence."""

    ids: list[int]
    labels: list[int]
    """As long as `ids`; -100 does not count."""
    keep: bool = True
    """False for captions of nothing but punctuation."""
    cut: int = 0
    """Images that did not fit and were dropped whole."""


class SampleBuilder:
    """Turns records into samples for one tokenizer.

    Example:
        >>> builder = SampleBuilder(tokenizer, vocabulary, max_length=200)
        >>> builder.caption(codes, "a red apple", image_first=True).ids
    """

    def __init__(
        self,
        tokenizer: Any,
        vocabulary: ImageVocabulary,
        *,
        max_length: int,
        truncation: str = "whole",
    ) -> None:
        """Keep what every sample needs.

        Args:
            tokenizer: The extended one, with beginning and end of text.
            vocabulary: Its images.
            max_length: Ids of a sample, at most.
            truncation: whole drops an image that would be cut in half; reference keeps the half.

        Raises:
            DataError: The tokenizer has no end of text.
        """
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no eos token; samples could not end")
        if truncation not in ("whole", "reference"):
            raise DataError(f"truncation={truncation!r} must be whole or reference")
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self.max_length, self.truncation = max_length, truncation
        bos = tokenizer.bos_token_id
        self.bos: list[int] = [] if bos is None else [bos]
        self.eos: int = tokenizer.eos_token_id

    def text(self, text: str) -> list[int]:
        """Return the ids of text; image words in it count as images only where they are meant."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def image(self, codes: Sequence[int]) -> list[int]:
        """Return the ids of an image."""
        return self.vocabulary.to_ids(codes)

    def caption(
        self, codes: Sequence[int], text: str, *, image_first: bool, mask_left: bool = False
    ) -> Sample:
        """Image and caption, one before the other.

        Args:
            codes: Of the image.
            text: The caption.
            image_first: The caption is to be told, else the image to be drawn.
            mask_left: Only the second half counts; else everything, the first id included.
        """
        parts = [self.image(codes), self.text(text)]
        first, second = parts if image_first else parts[::-1]
        ids = [*self.bos, *first, *second, self.eos]
        labels = list(ids)
        if mask_left:
            # Up to the bracket that opens or closes the image, which is a given.
            given = len(self.bos) + len(first) + (0 if image_first else 1)
            labels[:given] = [IGNORED] * given
        return self._sample(ids, labels, keep=bool(text.strip(" .,;:?!'\"")))

    def plain(self, text: str) -> Sample:
        """Text without images."""
        ids = [*self.bos, *self.text(text), self.eos]
        return self._sample(ids, list(ids))

    def video(self, frames: Sequence[int], answer: str) -> Sample:
        """Frames as images one after another, then the caption, which alone counts.

        Args:
            frames: Codes of all frames in one list.
            answer: The caption.
        """
        each = self.vocabulary.tokens_per_image
        if not frames or len(frames) % each:
            raise DataError(f"{len(frames)} codes are no whole number of images of {each}")
        first = [
            token
            for start in range(0, len(frames), each)
            for token in self.image(frames[start : start + each])
        ]
        return self._answered([*self.bos, *first], self.text(answer))

    def interleaved(
        self,
        images: Sequence[Sequence[int] | None],
        texts: Sequence[str | None],
        *,
        reverse: bool = False,
        max_images: int = 7,
    ) -> Sample:
        """A document of images and texts in order.

        Args:
            images: Codes, or None where there is text.
            texts: The reverse; exactly one of both at each place.
            reverse: Swap each image with the element after it.
            max_images: Behind so many images only one text directly after is kept.
        """
        if len(images) != len(texts) or any(
            (image is None) == (text is None) for image, text in zip(images, texts, strict=True)
        ):
            raise DataError("a document must have exactly one of image and text at each place")
        elements: list[Sequence[int] | str] = []
        count = 0
        for image, text in zip(images, texts, strict=True):
            if count == max_images and (image is not None or isinstance(elements[-1], str)):
                break
            if image is not None:
                count += 1
                elements.append(image)
            elif text is not None:
                elements.append(text)
        if reverse:
            place = 0
            while place + 1 < len(elements):
                if not isinstance(elements[place], str):
                    elements[place : place + 2] = elements[place : place + 2][::-1]
                    place += 1
                place += 1
        ids = list(self.bos)
        for element in elements:
            ids += self.text(element) if isinstance(element, str) else self.image(element)
        ids.append(self.eos)
        return self._sample(ids, list(ids))

    def conversation(
        self,
        turns: Sequence[tuple[str, str]],
        *,
        codes: Sequence[int] | None = None,
        answer_codes: Sequence[int] | None = None,
    ) -> Sample:
        """Questions and answers; the first question may show an image, the last answer draw one.

        Args:
            turns: Pairs of question and answer.
            codes: Of the image before the first question.
            answer_codes: Of the image behind the last answer.
        """
        if not turns:
            raise DataError("a conversation needs at least one question and answer")
        ids, labels = list(self.bos), [IGNORED] * len(self.bos)
        for number, (question, answer) in enumerate(turns):
            shown = self.vocabulary.text_of(codes) if codes is not None and number == 0 else ""
            start = USER if number == 0 else "\n" + USER
            prompt = self.text(f"{start}{shown}{question.strip()}{ASSISTANT}")
            ids += prompt
            labels += [IGNORED] * len(prompt)
            said = self.text(_stopped(answer))
            if answer_codes is not None and number == len(turns) - 1:
                said += self.image(answer_codes)
            ids += said
            labels += said
        return self._sample([*ids, self.eos], [*labels, self.eos])

    def draw(self, codes: Sequence[int], text: str, *, request: str, answer: str) -> Sample:
        """A request for a picture, and the picture.

        Args:
            codes: Of the picture.
            text: Its caption.
            request: A sentence with {} for the caption, such as one of DRAW_REQUESTS.
            answer: What is said before the picture, such as one of DRAW_ANSWERS.
        """
        caption = text.strip().removesuffix(".").strip()
        return self.conversation([(request.format(caption) + ".", answer)], answer_codes=codes)

    def record(self, record: dict[str, Any], *, draw: float, generator: Any) -> Sample:
        """Turn one record of a training file into a sample.

        Args:
            record: By its fields: `image_ids` with `text` (caption), `question` and `answer`,
                `data` (a list of both in turn), `texts` (document) or `answer` alone (video);
                `source_image_ids`, `target_image_ids`, `instruction` (editing); `text` alone.
            draw: Share of captions whose image comes second.
            generator: random.Random.
        """
        codes: Any = record.get("image_ids")
        if "source_image_ids" in record:
            question = record.get("instruction_gpt") or record["instruction"]
            answer = record.get("response") or generator.choice(DRAW_ANSWERS)
            return self.conversation(
                [(question, answer)],
                codes=record["source_image_ids"],
                answer_codes=record["target_image_ids"],
            )
        if codes is None:
            return self.plain(_needed(record, "text"))
        if "texts" in record:
            return self.interleaved(codes, record["texts"], reverse=generator.random() < draw)
        if codes and isinstance(codes[0], list | tuple):
            codes = codes[0]
        if "data" in record:
            said = list(record["data"])
            return self.conversation(list(zip(said[::2], said[1::2], strict=True)), codes=codes)
        if "question" in record:
            return self.conversation(split_turns(record["question"], _needed(record, "answer")),
                                     codes=codes)  # fmt: skip
        if "answer" in record:
            return self.video(codes, record["answer"])
        first = generator.random() >= draw
        return self.caption(codes, _needed(record, "text"), image_first=first)

    def _answered(self, prompt: list[int], answer: list[int]) -> Sample:
        said = [*answer, self.eos]
        return self._sample([*prompt, *said], [IGNORED] * len(prompt) + said)

    def _sample(self, ids: list[int], labels: list[int], *, keep: bool = True) -> Sample:
        if len(ids) <= self.max_length:
            return Sample(ids, labels, keep)
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        cut = 0
        if self.truncation == "whole":
            opened = max((i for i, t in enumerate(ids) if t == self.vocabulary.begin), default=-1)
            if opened >= 0 and self.vocabulary.end not in ids[opened:]:
                ids, labels, cut = ids[:opened], labels[:opened], 1
        return Sample(ids, labels, keep and any(x != IGNORED for x in labels), cut)


def split_turns(question: str, answer: str) -> list[tuple[str, str]]:
    """Return the turns of `Question: ... Question: ...` and `Answer: ... Answer: ...`.

    Raises:
        DataError: There are more of one than of the other.
    """
    questions = [part.strip() for part in _QUESTION.split(question) if part.strip()]
    answers = [part.strip() for part in _ANSWER.split(answer) if part.strip()]
    if len(questions) != len(answers):
        raise DataError(f"{len(questions)} questions and {len(answers)} answers do not pair up")
    return list(zip(questions, answers, strict=True))


def _stopped(text: str) -> str:
    text = text.strip()
    return text if text.endswith(".") else text + "."


def _needed(record: dict[str, Any], field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise DataError(
            f"a record has {sorted(record)} and needs the text field {field!r}; image_ids alone "
            "cannot be learned from"
        )
    return value
