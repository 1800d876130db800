"""The AI providers that the application asks: where they are, what they may cost, and how often they may be asked."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from prefect.blocks.core import Block
from pydantic import Field, SecretStr, model_validator

Provider = Literal["azure", "bedrock", "vertex"]
ProviderFault = Literal["500", "429", "timeout", "refused", "slow"]
Prices = Annotated[list[float], Field(min_length=2, max_length=2)]
Limit = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]


class AIProviders(Block):
    """Azure OpenAI, AWS Bedrock, GCP Vertex AI. A provider without models is none that the application asks."""

    _block_type_name = "Ops AI providers"
    _block_type_slug = "ops-ai-providers"

    prices: dict[str, Prices] = Field(
        default={}, description="model → price of a million prompt tokens and of a million completion tokens"
    )
    prices_from: str = Field(default="", description="where the prices are from, and of which day")
    currency: str = Field(default="USD")
    budget: float = Field(default=0, ge=0, description="of a month; 0: none")
    rate_limits: dict[str, Limit] = Field(
        default={}, description="what the limiter's keys in Redis begin with → requests, and seconds of their window"
    )

    chain: list[Provider] = Field(
        default=["azure", "bedrock", "vertex"], min_length=1, description="in which order the application asks them"
    )
    control: str = Field(default="", description="only where disposable: the address that makes its providers fail")
    proxy: dict[Provider, str] = Field(
        default={},
        description="provider → host:port where tasks.ai.proxy listens: the application's base URL for that provider",
    )
    timeout_seconds: float = Field(default=30, gt=0, description="for a provider's whole answer")
    slow_seconds: float = Field(default=10, gt=0, description="an answer that takes longer warns")
    canary_tokens: int = Field(default=64, ge=1, description="what the canary's answer may take")
    retirements: str = Field(default="", description="the table of retirement dates; empty: this project's own")
    sdks: dict[str, str] = Field(default={}, description="package of the application → the least version that will do")

    azure_endpoint: str = Field(default="", description="https://NAME.openai.azure.com")
    azure_key: SecretStr = SecretStr("")
    azure_deployments: list[str] = Field(default=[])
    azure_api_version: str = Field(default="", description="empty: what the application's env_file says")
    azure_version_variable: str = Field(default="AZURE_OPENAI_API_VERSION", description="its name in that file")

    bedrock_region: str = Field(default="", description="empty: AWS's own configuration")
    bedrock_models: list[str] = Field(default=[], description="ids of models or inference profiles")
    bedrock_access_key: str = Field(default="", description="empty: AWS's own chain of credentials")
    bedrock_secret_key: SecretStr = SecretStr("")
    bedrock_endpoint: str = Field(default="", description="of the service bedrock; empty: AWS")
    bedrock_runtime_endpoint: str = Field(default="", description="of the service bedrock-runtime; empty: AWS")

    vertex_project: str = Field(default="")
    vertex_location: str = Field(default="us-central1", description="or global")
    vertex_models: list[str] = Field(default=[])
    vertex_endpoint: str = Field(default="", description="empty: Google's own of the location")
    vertex_token_variable: str = Field(
        default="", description="the worker's variable that holds an access token; empty: Google's own credential chain"
    )

    @model_validator(mode="after")
    def _proxy_is_whole(self) -> Self:
        for name, address in self.proxy.items():
            if not re.fullmatch(r"[\w.-]+:\d{1,5}", address):
                raise ValueError(f"proxy: {name} is “{address}”; expected is host:port, e.g. 127.0.0.1:9101")
        if self.proxy and not re.fullmatch(r"http://[\w.-]+:\d{1,5}/?", self.control):
            raise ValueError(
                f"control is “{self.control}”; with proxy it is where the proxy takes faults, e.g. "
                "http://127.0.0.1:9100"
            )
        if self.proxy and (left := [name for name in self.chain if name not in self.proxy]):
            raise ValueError(f"proxy lacks {', '.join(left)}: give every provider of chain an address")
        return self
