"""A recipe: one TOML file that says what is wanted; each value remembers where it came from.

Precedence is override > recipe > plan > default. `load_recipe` reads the file and the overrides, `Recipe.with_plan`
fills what was left open from a plan, and `Recipe.origin` tells which of the four a value came from.
"""

from __future__ import annotations

import tomllib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from athanor.foundation.counts import Count, Whole
from athanor.foundation.errors import RecipeError, did_you_mean
from athanor.foundation.toml import assign, leaves, parse_value, toml_value

SourceKind = Literal["python", "folder", "git", "text", "jsonl", "parquet", "csv", "warc", "html", "pdf", "tokens"]
Precision = Literal["fp64", "fp32", "bf16", "fp8"]
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"  # of what becomes a file or a folder
TAKEN = {"data", "logs", "recipe.toml", "cluster.toml", "plan.toml", "forecast.json", "actual.json", "scores.json",
         "report.html", "chain.jsonl", "feedback.jsonl"}  # by the run folder
OF_TOKENIZERS = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"}  # no sizes that a recipe sets


class Section(BaseModel):
    """A table of a recipe: unknown keys are errors, and None means "left open for the plan"."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class Budget(Section):
    minutes: float | None = Field(None, gt=0, le=1e9, description="step time of all training stages together, in minutes")
    days: float | None = Field(None, gt=0, le=1e6, description="days of the calendar for all training stages together; what "
                               "faults, saves and restarts are expected to take is taken off")
    pd: float | None = Field(None, gt=0, le=1e9, description="model FLOPs of all training stages together, in PD (8.64e19 FLOP)")
    tokens: Count | None = Field(None, gt=0, description="tokens of all training stages together")
    money: float | None = Field(None, gt=0, le=1e15, description="price of the step time; needs cluster.price_per_device_hour")

    @property
    def given(self) -> list[str]:
        """Names of what is set; one at most."""
        return [name for name, value in self.model_dump().items() if value is not None]


class Cluster(Section):
    file: str = Field("auto", description="a cluster.toml; 'auto' measures this machine when none lies in the run folder")
    accelerator: str | None = Field(None, description="a known accelerator, for rehearsals, and for plans by its datasheet")
    devices: Whole | None = Field(None, gt=0, description="devices (on CPU: ranks) to use; all of them when left out")
    per_node: int | None = Field(None, gt=0, le=1e6, description="devices per node")
    nic_gbps: float | None = Field(None, gt=0, le=1e6, description="network bandwidth of one device, in Gbit/s")
    write_bytes_per_second: float | None = Field(None, gt=0, description="of one device's saves, by name of cluster.accelerator")
    price_per_device_hour: float | None = Field(None, gt=0, le=1e9, description="money per device and hour")


class PlanChoice(Section):
    file: str = Field("auto", description="a plan.toml to follow as it is; 'auto' makes one")


class Source(Section):
    name: str = Field(pattern=NAME, description="name of the source, used in the funnel and the lineage")
    kind: SourceKind = Field(description="how the source is read")
    path: str = Field("auto", min_length=1, description="file or folder, relative to where the command runs; 'auto' is the "
                      "interpreter's standard library for kind 'python'")
    weight: float = Field(1.0, gt=0, le=1e9, description="share of this source among the training tokens, relative to the others")


class Data(Section):
    vocab_size: Whole | None = Field(None, ge=300, le=1_000_000, description="entries of the tokenizer that is trained")
    tokenizer: str | None = Field(None, description="a folder or tokenizer.json to use instead of training one")
    evaluation_share: float = Field(0.02, ge=0, lt=1, description="share of documents held out, chosen by content hash")
    source: list[Source] = Field(min_length=1, description="where the text comes from")


class Model(Section):
    architecture: str = Field("llama", description="a file in models/zoo, or package.module")
    hidden_size: int | None = Field(None, gt=0, le=1e7, description="width of the residual stream")
    intermediate_size: int | None = Field(None, gt=0, le=1e7, description="width of the feed-forward layer")
    num_experts: int | None = Field(None, gt=0, le=1e6, description="experts in each block, of an architecture that mixes them")
    num_experts_per_tok: int | None = Field(None, gt=0, le=1e6, description="experts that each token goes to")
    num_hidden_layers: int | None = Field(None, gt=0, le=1e4, description="decoder blocks")
    num_attention_heads: int | None = Field(None, gt=0, le=1e6, description="query heads")
    num_key_value_heads: int | None = Field(None, gt=0, description="key and value heads; equal to the query heads unless set")
    head_dim: int | None = Field(None, gt=0, le=1e6, description="width of a head; hidden_size / num_attention_heads unless set")
    max_position_embeddings: Whole | None = Field(None, gt=0, description="longest context in tokens")
    rope_theta: float | None = Field(None, gt=0, le=1e15, description="base of the rotary frequencies")
    rms_norm_eps: float | None = Field(None, gt=0, le=1, description="epsilon of RMSNorm")
    initializer_range: float | None = Field(None, gt=0, le=10, description="standard deviation of the initial weights")
    tie_word_embeddings: bool | None = Field(None, description="whether the head reuses the embedding's weights")
    sizes: dict[str, bool | int | float] = Field({}, description="further sizes of the architecture, by its field's names, such "
                                                 "as moe_intermediate_size")

    def given(self) -> dict[str, Any]:
        """Every size that is set."""
        return {**self.model_dump(exclude={"architecture", "sizes"}, exclude_none=True), **self.sizes}


class Parallel(Section):
    pp: int | None = Field(None, ge=1, le=1e9, description="pipeline stages")
    dp_replicate: int | None = Field(None, ge=1, le=1e9, description="replicas of the sharded model (HSDP)")
    dp_shard: int | None = Field(None, ge=-1, le=1e9, description="ranks that parameters are sharded over; -1 is the rest")
    cp: int | None = Field(None, ge=1, le=1e9, description="context-parallel ranks")
    tp: int | None = Field(None, ge=1, le=1e9, description="tensor-parallel ranks")
    ep: int | None = Field(None, ge=1, le=1e9, description="expert-parallel ranks")
    pipeline_schedule: str | None = Field(None, description="GPipe, 1F1B, Interleaved1F1B, LoopedBFS, or (not with "
                                          "compile) InterleavedZeroBubble, ZBVZeroBubble, DualPipeV")
    num_microbatches: int | None = Field(None, ge=1, le=1e9, description="micro-batches per pipeline step")
    recompute: str | None = Field(None, pattern=r"^(none|full|selective|every-[1-9]\d*)$", description=(
        "none, full, selective (all but matmuls and attention), or 'every-k' blocks"))
    split: list[int] | None = Field(None, description="decoder blocks of each pipeline stage")
    keep_whole: bool | None = Field(None, description="whether a rank holds whole weights and gradients during a step (less "
                                    "communication, more memory); where they are small, and in a pipeline, unless set")


class ParameterGroup(Section):
    pattern: str = Field(min_length=1, description="names of parameters, as a shell's pattern; the first group that fits counts")
    learning_rate_factor: float = Field(1.0, ge=0, le=1e6, description="their learning rate as a multiple of the stage's")
    weight_decay: float | None = Field(None, ge=0, le=1e3, description="their decoupled weight decay; the stage's when left out")


class Stage(Section):
    name: str = Field(pattern=NAME, description="name of the stage and of its folder")
    objective: str = Field("pretrain", description="a file in objectives/zoo, or package.module")
    start_from: str | None = Field(None, description="an earlier stage's name, or any Hugging Face folder")
    data: str = Field("documents", description="'documents' or 'pairs' of the data folder, or a JSONL of conversations")
    share: float | None = Field(None, gt=0, le=1, description="share of the budget; pretraining 0.85 unless set")
    seq_len: Whole | None = Field(None, ge=8, description="tokens of one packed row")
    steps: Whole | None = Field(None, ge=1, description="optimizer steps")
    tokens: Count | None = Field(None, gt=0, description="tokens to train on; an alternative to steps")
    micro_batch_size: Whole | None = Field(None, ge=1, description="rows per rank and forward pass")
    global_batch_tokens: Whole | None = Field(None, ge=1, description="tokens of one optimizer step, over all ranks")
    batch_ramp: list[Whole] | None = Field(None, min_length=3, max_length=3, description=(
        "[rows to start with, rows to add, samples until the global batch]; warm-up still counts steps"))
    learning_rate: float | None = Field(None, gt=0, le=10, description="peak learning rate")
    learning_rate_schedule: Literal["cosine", "linear", "wsd", "constant"] | None = Field(
        None, description="shape of the decay after warm-up")
    warmup_steps: Whole | None = Field(None, ge=0, description="steps of linear warm-up")
    weight_decay: float | None = Field(None, ge=0, le=1e3, description="decoupled weight decay of matrices")
    gradient_clip: float | None = Field(None, gt=0, le=1e38, description="largest global gradient norm")
    z_loss: float | None = Field(None, ge=0, le=1, description="coefficient of the squared logsumexp in the loss; 0 unless set")
    expert_bias_rate: float | None = Field(None, ge=0, le=1, description="step of the biases that keep experts equally "
                                           "loaded, of an architecture that has them; 0.001 unless set")
    mtp_weight: float | None = Field(None, gt=0, le=1, description="coefficient of the mean loss of blocks that predict further "
                                     "tokens (model.sizes.num_nextn_predict_layers); 0.3 unless set")
    spike_sigma: float = Field(6.0, ge=0, le=1e9, description="a step whose loss or gradient norm is more deviations above the "
                               "mean is skipped; 0 skips only what is not finite")
    spike_window: int = Field(128, ge=2, le=100_000, description="steps for mean and deviation; none is a spike before")
    most_skipped_steps: int = Field(10, ge=1, description="skipped steps in a row that roll back to the newest good checkpoint")
    most_rollbacks: int = Field(3, ge=0, description="rollbacks to one checkpoint, passing over the data after it each time")
    optimizer: Literal["adamw", "muon"] | None = Field(None, description="the update rule")
    optimizer_state_dtype: Literal["fp32", "bf16"] = Field("fp32", description="dtype of moments; fp32 is that of the weights")
    group: list[ParameterGroup] = Field([], description="parameters that learn otherwise than the rest")
    precision: Precision | None = Field(None, description="dtype of the computation; weights stay in fp32 (fp64 for fp64)")
    compile: bool | None = Field(None, description="whether each block is compiled")
    checkpoint_every: Whole | None = Field(None, ge=1, description="steps between checkpoints")
    keep_latest_k: Whole = Field(2, ge=0, description="checkpoints that stay, the latest ones; 0 keeps all")
    keep_every: Whole | None = Field(None, ge=1, description="steps between further checkpoints, which stay for good")
    save_async: bool = Field(True, description="whether training goes on while a copy in host memory is written")
    evaluate_every: Whole | None = Field(None, ge=1, description="steps between validations")
    evaluate_rows: Whole | None = Field(None, ge=1, description="held-out rows of a validation; all unless set or planned")
    hang_seconds: float | None = Field(None, ge=1, le=1e9, description="seconds without progress after which ranks are looked at "
                                       "and started again, but never less than 10 steps; 30 unless set")
    data_shards: Whole | None = Field(None, ge=1, description="virtual data shards; micro-batches of a global batch unless set")
    reduction: Literal["fast", "exact"] = Field("fast", description="'exact': any number of data ranks that divides data_shards "
                                                "trains the same bits, at some cost")


class Evaluate(Section):
    tasks: list[str] = Field(["bits_per_byte"], description="tasks, each a name, a package.module, or lm_eval:<its name there>")
    limit: Whole | None = Field(None, ge=1, description="items per task at most; all of them unless set or planned")
    lm_eval_data: str | None = Field(None, description="folder with the data of lm_eval's tasks, as the README says")
    tp: int = Field(1, ge=1, le=1e6, description="ranks that share each model, by tensor parallelism")


class Serve(Section):
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    api_key: str | None = Field(None, description="required as a bearer token when set")


class Metrics(Section):
    tensorboard: str | None = Field(None, description="folder for TensorBoard's event files, below it <run>/<stage>")


class Recipe(Section):
    """The whole file. `origins` maps dotted keys to 'override', 'recipe' or 'plan'; what is missing there is a default."""

    name: str = Field(pattern=NAME, description="name of the run and of its folder")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of weights, data order and samples")
    budget: Budget = Field(default_factory=Budget, description="how much may be spent")
    cluster: Cluster = Field(default_factory=Cluster, description="on what")
    plan: PlanChoice = Field(default_factory=PlanChoice, description="the plan to follow")
    data: Data = Field(description="from what text")
    model: Model = Field(default_factory=Model, description="which model")
    parallel: Parallel = Field(default_factory=Parallel, description="laid out how")
    stage: list[Stage] = Field(min_length=1, description="training stages, in order")
    metrics: Metrics = Field(default_factory=Metrics, description="shown where")
    evaluate: Evaluate = Field(default_factory=Evaluate, description="measured by what")
    serve: Serve = Field(default_factory=Serve, description="served where")

    _origins: dict[str, str] = pydantic.PrivateAttr(default_factory=dict)
    _file: str = pydantic.PrivateAttr(default="recipe")

    def get_stage(self, name: str) -> Stage:
        for stage in self.stage:
            if stage.name == name:
                return stage
        raise RecipeError(f"{self._file} has no stage '{name}'; {did_you_mean(name, [s.name for s in self.stage])}")

    def origin(self, key: str) -> str:
        """Where `model.hidden_size` or `stage.pretrain.steps` came from: override, recipe, plan or default."""
        return self._origins.get(key, "default")

    def with_plan(self, plan: dict[str, Any], plan_file: str = "plan.toml") -> Recipe:
        """The recipe with every value that was left open filled from a plan's tables of the same names."""
        found = leaves({k: v for k, v in plan.items() if k in ("data", "model", "parallel", "stage", "evaluate")})
        return self.with_values({key: value for key, value in found if self._origins.get(key) not in ("override", "recipe")},
                                "plan", plan_file)

    def with_values(self, values: dict[str, Any], origin: str, where: str = "recipe") -> Recipe:
        """The recipe with these values at their dotted keys, which came from `origin`; None leaves a key open."""
        merged = self.model_dump(exclude_none=True)
        for key, value in values.items():
            assign(merged, key.split("."), value, where)
        recipe = _validate(merged, where)
        recipe._origins, recipe._file = {**self._origins, **dict.fromkeys(values, origin)}, self._file
        return recipe

    def annotated(self, *tables: str) -> str:
        """TOML text of the given tables (all when none), each value followed by a comment with its origin."""
        dump = self.model_dump(exclude_none=True)
        lines: list[str] = []
        for table in tables or tuple(dump):
            value = dump[table]
            rows = value if table == "stage" else [value]
            for row in rows:
                if not isinstance(row, dict):
                    lines.append(f"{table} = {toml_value(row)}  # {self.origin(table)}")
                    continue
                prefix = f"{table}.{row['name']}" if table == "stage" else table
                lines.append(f"\n[[{table}]]" if table == "stage" else f"\n[{table}]")
                lines += [f"{k} = {toml_value(v)}  # {self.origin(f'{prefix}.{k}')}" for k, v in row.items()]
        return "\n".join(lines).strip() + "\n"


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply `key=value` overrides such as `stage.pretrain.steps=100`.

    Raises RecipeError with file, key, what is allowed and the nearest valid name.
    """
    file = str(path)
    raw = _read_toml(Path(path), "recipe")
    origins = {key: "recipe" for key, _ in leaves(raw)}
    for text in overrides or []:
        key, sep, value = text.partition("=")
        if not sep or not key:
            raise RecipeError(f"override '{text}' is not of the form key=value, such as stage.pretrain.steps=100")
        assign(raw, key.split("."), parse_value(value), f"override '{text}'")
        origins[key] = "override"
    recipe = _validate(raw, file)
    recipe._origins, recipe._file = origins, file
    _check_meaning(recipe, file)
    return recipe


def read_plan(path: Path) -> dict[str, Any]:
    """The tables of a plan.toml. Raises RecipeError when it is not there or not TOML."""
    return _read_toml(path, "plan")


def _read_toml(path: Path, kind: str) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{kind} {path} does not exist") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder; a {kind} is a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from None


def document() -> list[tuple[str, str, str, str]]:
    """Every key of a recipe as (key, type, default, meaning), for the reference page and its test."""
    rows = []

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            inner = _section_of(field.annotation)
            if inner is not None:
                is_list = typing.get_origin(field.annotation) is list
                walk(inner, f"{prefix}{name}[]." if is_list else f"{prefix}{name}.")
                continue
            unset = "required" if field.is_required() else "planned or unset"
            default = unset if field.default is None or field.is_required() else toml_value(field.default)
            rows.append((prefix + name, _type_name(field.annotation), default, field.description or ""))

    walk(Recipe, "")
    return rows


def _check_meaning(recipe: Recipe, file: str) -> None:
    if len(recipe.budget.given) > 1:
        raise RecipeError(f"{file}: budget has {' and '.join(recipe.budget.given)}; give one of minutes, days, pd, tokens, money")
    if recipe.budget.money is not None and recipe.cluster.price_per_device_hour is None:
        raise RecipeError(f"{file}: budget.money needs cluster.price_per_device_hour")
    if recipe.parallel.dp_shard == 0:
        raise RecipeError(f"{file}: 'parallel.dp_shard' is 0: it must be -1 (the rest) or at least 1")
    for key in recipe.model.sizes:
        if key in Model.model_fields or key in OF_TOKENIZERS:
            why = "follows from the tokenizer; leave it out" if key in OF_TOKENIZERS else f"has a key of its own; set model.{key}"
            raise RecipeError(f"{file}: 'model.sizes.{key}' {why}")
    names = [stage.name for stage in recipe.stage]
    for index, stage in enumerate(recipe.stage):
        if stage.name in names[:index]:
            raise RecipeError(f"{file}: two stages are called '{stage.name}'")
        if stage.name in TAKEN:
            raise RecipeError(f"{file}: a stage cannot be called '{stage.name}', the run folder uses that name")
        if stage.steps is not None and stage.tokens is not None:
            raise RecipeError(f"{file}: stage.{stage.name} has both steps and tokens; give one")
        if stage.start_from in names[index:]:
            raise RecipeError(f"{file}: stage.{stage.name}.start_from names '{stage.start_from}', which does not come before it")
    for index, source in enumerate(recipe.data.source):
        if source.name in [other.name for other in recipe.data.source[:index]]:
            raise RecipeError(f"{file}: two sources are called '{source.name}'")
    if recipe.data.vocab_size is not None and recipe.data.tokenizer is not None:
        raise RecipeError(f"{file}: data has both vocab_size and tokenizer; give one")


def _validate(raw: dict[str, Any], file: str) -> Recipe:
    try:
        return Recipe.model_validate(raw)
    except pydantic.ValidationError as error:
        raise RecipeError(f"{file}: {_sentence(error.errors()[0], raw)}") from None


def _sentence(problem: Any, raw: dict[str, Any]) -> str:
    """One pydantic problem as a sentence with key, value and what is allowed."""
    location = [part for part in problem["loc"] if isinstance(part, (str, int))]
    if location[:2] == ["model", "sizes"] and len(location) > 2:  # behind the key stands which of its types does not fit
        value = raw["model"]["sizes"][location[2]]
        return f"'model.sizes.{location[2]}' is {value!r}: it must be a finite number, true or false"
    key, kind, context = _dotted(location, raw), problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        section = _section_at(location[:-1])
        return f"unknown key '{key}'; {did_you_mean(str(location[-1]), section.model_fields)}"
    if kind == "missing":
        return f"'{key}' is missing"
    if kind == "literal_error":
        options = [o.strip("'") for o in context["expected"].replace(" or ", ", ").split(", ")]
        return f"'{key}' is {problem['input']!r}; {did_you_mean(str(problem['input']), options)}"
    reason = problem["msg"][0].lower() + problem["msg"][1:]
    if kind in ("list_type", "too_short", "too_long"):
        reason = f"it must be a list of {context.get('min_length') or context.get('max_length') or 'several'} values"
    field = _section_at(location[:-1]).model_fields.get(str(location[-1])) if location else None
    return f"'{key}' is {problem['input']!r}: {reason}" + (f" ({field.description})" if field is not None else "")


def _dotted(location: list[str | int], raw: Any) -> str:
    """A key as people write it: stages and sources by their name instead of their number."""
    parts: list[str] = []
    for part in location:
        if isinstance(part, int):
            raw = raw[part] if isinstance(raw, list) and part < len(raw) else None
            name = raw.get("name") if isinstance(raw, dict) else None
            parts.append(str(name) if name else str(part))
        else:
            raw = raw.get(part) if isinstance(raw, dict) else None
            parts.append(part)
    return ".".join(parts)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType):
        return next((s for a in typing.get_args(annotation) if (s := _section_of(a))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _section_at(location: list[str | int]) -> type[BaseModel]:
    section: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, str) and part in section.model_fields:
            section = _section_of(section.model_fields[part].annotation) or section
    return section


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return " | ".join(str(a) for a in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(_type_name(a) for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is list:
        return f"list of {_type_name(typing.get_args(annotation)[0])}"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true | false"}.get(
        getattr(annotation, "__name__", ""), str(annotation))
