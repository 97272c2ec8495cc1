"""What the images API takes and gives, after OpenAI's, with fields of our own."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..config import MAX_SEED

DECODE_FIELDS = (
    "decoder", "window", "denoise_levels", "guidance_scale", "temperature", "top_k", "top_p", "verification",
    "coupling", "negative_prompt",
)  # fmt: skip


class ImageRequest(BaseModel):
    """A request for pictures; the second half are options of `DecodeConfig`, with the model's defaults."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1, description="What to draw.")
    model: str | None = Field(None, description="The model being served, or nothing.")
    n: int = Field(1, ge=1, description="How many pictures; picture i has seed + i.")
    size: str = Field("auto", description="auto, or the model's own size as WIDTHxHEIGHT.")
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="Only b64_json; there are no files.")
    output_format: Literal["png"] = "png"
    quality: Literal["auto", "standard"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    stream: bool = Field(False, description="Answer with server-sent events.")
    partial_images: int = Field(0, ge=0, le=3, description="Previews per picture, with stream.")
    user: str | None = Field(None, description="Taken for compatibility and not used.")

    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Of the first picture; random if not given.")
    decoder: str | None = Field(None, description="ar, jacobi, sjd, coupled or sjd2.")
    window: int | Literal["auto"] | None = Field(None, description="Model inputs per forward pass and picture.")
    denoise_levels: int | None = Field(None, description="Noise levels of sjd2.")
    # Beyond these bounds logits overflow, which would look like a fault of the server.
    guidance_scale: float | None = Field(None, ge=-100, le=100, description="Classifier-free guidance.")
    temperature: float | None = Field(None, ge=0, le=100, description="0 takes the likeliest token, else from 0.001.")
    top_k: int | None = Field(None, description="Keep the k most likely tokens; 0 = all.")
    top_p: float | None = Field(None, description="Keep the most likely tokens up to this probability.")
    verification: str | None = Field(None, description="sjd2: match, ratio or paper.")
    coupling: str | None = Field(None, description="coupled, and sjd2 with ratio: gumbel, maximal or none.")
    negative_prompt: str | None = Field(None, description="Prompt of the unconditional row.")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The only shape in which errors leave the server."""

    error: ErrorDetail


class ImageData(BaseModel):
    """A picture, or why this one failed."""

    b64_json: str | None = None
    seed: int
    forward_passes: int | None = None
    latency_s: float | None = None
    error: ErrorDetail | None = None


class TokenDetails(BaseModel):
    image_tokens: int = 0
    text_tokens: int


class Usage(BaseModel):
    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    total_tokens: int


class ImagesResponse(BaseModel):
    """The answer without stream."""

    created: int
    model: str
    decoder: str
    size: str
    output_format: str = "png"
    quality: str = "auto"
    background: str = "opaque"
    data: list[ImageData]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "sjd2-engine"


class ModelList(BaseModel):
    object: str = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """ready: takes requests. waiting, active: pictures without and with a slot."""

    status: Literal["ready", "stopping", "failed"]
    model: str
    waiting: int
    active: int
