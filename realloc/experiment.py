"""Experiments: the algorithm, its models, its workload, its data and, optionally, its cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from realloc.algorithm import Algorithm, resolve
from realloc.backend import OWN, TRAINING_BACKENDS
from realloc.cluster import Cluster, cluster_content, parse_cluster
from realloc.columns import wanted
from realloc.constraints import NO_CONSTRAINTS, Constraints, constraints_content, parse_constraints
from realloc.data_spec import DataSpec, data_content, parse_data
from realloc.dataflow import CallKind, DataflowGraph, Output, Per
from realloc.errors import InputError
from realloc.evaluation import EvaluationSpec, evaluation_content, parse_evaluation, with_evaluation
from realloc.files import Reader, nearest, read_file, resolve_path
from realloc.lengths import MOST, Lengths, Measure, lengths_content, parse_lengths, raggedness
from realloc.model_shape import DTYPE_BYTES, ModelShape, resolve_shape
from realloc.model_zoo import named_shapes
from realloc.pretrain import SECTION, PretrainData, check_mixtures, parse_pretrain, pretrain_content
from realloc.rewards import RewardSource, parse_rewards, rewards_content
from realloc.sampling import AS_IT_IS, Sampling, parse_sampling, sampling_content
from realloc.text_lengths import TextLengths
from realloc.trust import check_algorithm


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW of one trainable role.

    The rate rises linearly over `warmup_steps`, then stays (`constant`) or falls to 0 at the last
    optimizer step (`linear`, `cosine`). `clip_norm` 0 clips nothing.
    """

    learning_rate: float = 1e-5
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    warmup_steps: int = 0
    decay: str = "constant"


@dataclass(frozen=True)
class ModelSpec:
    """A role's model: a Hugging Face folder (absolute path) or the name of a shape."""

    role: str
    model: str
    shape: ModelShape
    optimizer: OptimizerSpec

    @property
    def has_weights(self) -> bool:
        return self.model not in named_shapes()


@dataclass(frozen=True)
class Workload:
    """One iteration: how many sequences, how long. Responses stop at `response.maximum`.

    `sequences` are prompts times `samples_per_prompt`: so many neighbours continue one prompt.
    """

    sequences: int
    prompt: Lengths
    response: Lengths
    samples_per_prompt: int = 1

    @property
    def prompts(self) -> int:
        """Distinct prompts of an iteration."""
        return self.sequences // self.samples_per_prompt

    @property
    def sequence_square(self) -> float:
        """Mean of the squared lengths of sequences; prompts and responses are taken to be independent."""
        prompt, response = self.prompt, self.response
        return prompt.mean_square + 2 * prompt.mean * response.mean + response.mean_square

    @property
    def sequence_raggedness(self) -> float:
        """How ragged a pack of sequences is."""
        return raggedness(self.prompt.mean + self.response.mean, self.sequence_square)


@dataclass(frozen=True)
class Experiment:
    algorithm: str
    models: Mapping[str, ModelSpec]
    workload: Workload
    iterations: int = 1
    data: DataSpec | None = None
    pretrain: PretrainData | None = None
    reward: str | None = None
    rewards: tuple[RewardSource, ...] = ()
    evaluation: EvaluationSpec | None = None
    hyperparameters: Mapping[str, Any] | None = None
    sampling: Sampling = AS_IT_IS
    dtype: str = "float32"
    seed: int = 0
    cluster: Cluster | None = None
    training_backend: str = OWN
    constraints: Constraints = NO_CONSTRAINTS

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def mixed(self) -> Workload | None:
        """What an iteration mixes in (`Call.mixture`): the first token of a text stands for its prompt."""
        if self.pretrain is None:
            return None
        return Workload(self.pretrain.sequences, Lengths(1.0, 1), self.pretrain.tokens.less(1))

    def resolve_algorithm(self) -> Algorithm:
        return resolve(self.algorithm, "experiment: algorithm")

    def graph(self) -> DataflowGraph:
        """The checked dataflow graph, every role of which has a model. Raises InputError."""
        graph = self.resolve_algorithm().graph(self)
        graph.check()
        contexts = {role: spec.shape.max_positions for role, spec in self.models.items()}
        check_mixtures(graph, self.pretrain, contexts)
        if self.evaluation is not None:
            graph = with_evaluation(graph, self.evaluation)
            graph.check()
        for role in graph.roles:
            if role not in self.models:
                raise InputError(f"experiment: models: {self.algorithm} needs a model for the role '{role}'.")
        for role in self.models:
            if role not in graph.roles:
                raise InputError(
                    f"experiment: models: {self.algorithm} has no role '{role}'.{nearest(role, graph.roles)}"
                )
        return graph

    def role_shape(self, graph: DataflowGraph, role: str) -> ModelShape:
        """The shape of a role, with the head that its calls need.

        Raises InputError when its calls need both heads.
        """
        heads = set()
        for call in graph.calls_of(role):
            if call.kind is CallKind.GENERATE or call.output is Output.LOGPROBS:
                heads.add("lm")
            elif call.output is not None:
                heads.add("scalar")
        if len(heads) > 1:
            raise InputError(f"dataflow graph: the calls of role {role} need two different heads.")
        return replace(self.models[role].shape, head=heads.pop() if heads else "lm")

    def mean_elements(self, per: Per) -> float:
        """Mean number of elements that a key of this kind has for one sequence."""
        prompt, response = self.workload.prompt.mean, self.workload.response.mean
        return {
            Per.SEQUENCE: 1.0,
            Per.PROMPT_TOKEN: prompt,
            Per.RESPONSE_TOKEN: response,
            Per.TOKEN: prompt + response,
        }[per]


def read_experiment(path: str | Path) -> Experiment:
    """Reads an `experiment/1` file; paths in it are relative to its folder. Raises InputError."""
    return parse_experiment(read_file(path, "experiment"), Path(path).resolve().parent)


def parse_experiment(reader: Reader, folder: Path, *, trust: bool = True) -> Experiment:
    """Reads an experiment from a mapping and checks it against its algorithm's graph.

    `trust`: an algorithm of the user's own may be imported (`realloc.trust`).
    """
    algorithm = reader.get("algorithm", str)
    check_algorithm(algorithm, reader.at("algorithm"), trust=trust)
    models_reader = reader.child("models")
    models = {role: _parse_model(models_reader, role, folder) for role in models_reader.keys()}
    tokenizer = next((spec.model for spec in models.values() if spec.has_weights), None)
    data_reader = reader.optional_child("data")
    data = None if data_reader is None else parse_data(data_reader, folder)
    pretrain_reader = reader.optional_child(SECTION)
    sampling_reader = reader.optional_child("sampling")
    cluster_reader = reader.optional_child("cluster")
    evaluation_reader = reader.optional_child("evaluation")
    constraints_reader = reader.optional_child("constraints")
    workload_reader = reader.child("workload")
    experiment = Experiment(
        algorithm=algorithm,
        models=models,
        workload=_parse_workload(workload_reader, _not_yet, _not_yet),
        iterations=reader.integer("iterations", 1, minimum=1),
        data=data,
        pretrain=None if pretrain_reader is None else parse_pretrain(pretrain_reader, folder, tokenizer),
        reward=reader.get("reward", str, None),
        rewards=parse_rewards(reader.raw("rewards", None), reader.at("rewards")),
        evaluation=None if evaluation_reader is None else parse_evaluation(evaluation_reader),
        sampling=AS_IT_IS if sampling_reader is None else parse_sampling(sampling_reader),
        dtype=reader.choice("dtype", ("float32", "bfloat16"), "float32"),
        seed=reader.integer("seed", 0, minimum=0, maximum=2**31 - 1),
        cluster=None if cluster_reader is None else parse_cluster(cluster_reader, folder),
        training_backend=reader.choice("training_backend", TRAINING_BACKENDS, OWN),
        constraints=NO_CONSTRAINTS if constraints_reader is None else parse_constraints(constraints_reader),
    )
    given = reader.raw("hyperparameters", None)
    hyper_reader = Reader({} if given is None else given, reader.at("hyperparameters"))
    reader.done()
    algorithm_object = resolve(algorithm, reader.at("algorithm"))
    hyperparameters = algorithm_object.hyperparameters(hyper_reader)
    hyper_reader.done()
    experiment = replace(experiment, hyperparameters=hyperparameters)
    texts = TextLengths(workload_reader.where, tokenizer, data, wanted(experiment.graph()))
    workload = _parse_workload(workload_reader, texts.prompts, texts.responses)
    experiment = replace(experiment, workload=workload)
    graph = experiment.graph()
    for role in graph.roles:
        experiment.role_shape(graph, role)
    experiment.constraints.check(graph, reader.at("constraints"))
    _check_lengths(experiment, reader.where)
    _check_together(experiment, reader)
    return experiment


def _check_together(experiment: Experiment, reader: Reader) -> None:
    """What one section asks of another."""
    data = experiment.data
    if experiment.evaluation is not None and data is not None and not data.holds_out:
        raise InputError(
            f"{reader.at('evaluation')}: takes rows that are not trained on; keep some with data.holdout, "
            f"such as holdout: 0.05, or name others with data.holdout_path."
        )
    if experiment.training_backend != OWN and experiment.dtype != "float32":
        raise InputError(
            f"{reader.where}: training_backend: {experiment.training_backend} trains in float32, not "
            f"{experiment.dtype}; change dtype, or use training_backend: own."
        )


def _parse_model(models: Reader, role: str, folder: Path) -> ModelSpec:
    value = models.raw(role)
    where = models.at(role)
    if isinstance(value, str):
        value = {"path": value}
    reader = Reader(value, where)
    model = reader.get("path", str)
    optimizer_reader = reader.optional_child("optimizer")
    reader.done()
    if model not in named_shapes():
        candidate = resolve_path(model, folder, where)
        # a bare word that is no folder is more likely a misspelt shape than a path
        if candidate.exists() or "/" in model:
            model = str(candidate)
    optimizer = OptimizerSpec() if optimizer_reader is None else _parse_optimizer(optimizer_reader)
    return ModelSpec(role, model, resolve_shape(model, where), optimizer)


def _parse_optimizer(reader: Reader) -> OptimizerSpec:
    default = OptimizerSpec()
    spec = OptimizerSpec(
        learning_rate=reader.number("learning_rate", default.learning_rate, minimum=0.0),
        beta1=reader.number("beta1", default.beta1, minimum=0.0, maximum=0.9999999),
        beta2=reader.number("beta2", default.beta2, minimum=0.0, maximum=0.9999999),
        eps=reader.number("eps", default.eps, minimum=0.0),
        weight_decay=reader.number("weight_decay", default.weight_decay, minimum=0.0),
        clip_norm=reader.number("clip_norm", default.clip_norm, minimum=0.0),
        warmup_steps=reader.integer("warmup_steps", default.warmup_steps, minimum=0),
        decay=reader.choice("decay", ("constant", "linear", "cosine"), default.decay),
    )
    reader.done()
    return spec


def _not_yet(longest: int | None) -> Mapping[int, int]:
    """Stands for lengths that can be measured once the graph says what is taken from the data."""
    return {MOST if longest is None else longest: 1}


def _parse_workload(reader: Reader, prompts: Measure, responses: Measure) -> Workload:
    """Lengths that are `measured` are what `prompts` and `responses` find."""
    workload = Workload(
        sequences=reader.integer("sequences", minimum=1, maximum=100_000_000),
        prompt=parse_lengths(reader, "prompt_tokens", prompts),
        response=parse_lengths(reader, "response_tokens", responses),
        samples_per_prompt=reader.integer("samples_per_prompt", 1, minimum=1, maximum=100_000_000),
    )
    reader.done()
    if workload.sequences % workload.samples_per_prompt:
        raise InputError(
            f"{reader.at('samples_per_prompt')}: {workload.samples_per_prompt} samples of each prompt do not "
            f"divide the {workload.sequences} sequences; make sequences a multiple of it."
        )
    return workload


def _check_lengths(experiment: Experiment, where: str) -> None:
    total = experiment.workload.prompt.maximum + experiment.workload.response.maximum
    least, most = experiment.sampling.min_new_tokens, experiment.workload.response.maximum
    if least > most:
        raise InputError(
            f"{where}: sampling: min_new_tokens {least} exceeds the {most} tokens that a response may have "
            f"(workload.response_tokens); lower one or raise the other."
        )
    for spec in experiment.models.values():
        if total > spec.shape.max_positions:
            raise InputError(
                f"{where}: workload: prompts of up to {experiment.workload.prompt.maximum} tokens "
                f"plus responses of up to {experiment.workload.response.maximum} make {total}, but "
                f"{spec.role}'s model has a context of {spec.shape.max_positions}; shorten one."
            )


def experiment_content(experiment: Experiment) -> Mapping[str, Any]:
    """The experiment as a mapping that `parse_experiment` reads back to an equal value."""
    content: dict[str, Any] = {"algorithm": experiment.algorithm}
    default = OptimizerSpec()
    models: dict[str, Any] = {}
    for role, spec in experiment.models.items():
        entry: dict[str, Any] = {"path": spec.model}
        if spec.optimizer != default:
            entry["optimizer"] = dict(vars(spec.optimizer))
        models[role] = entry
    content["models"] = models
    workload = experiment.workload
    content["workload"] = {
        "sequences": workload.sequences,
        "prompt_tokens": lengths_content(workload.prompt),
        "response_tokens": lengths_content(workload.response),
    }
    if workload.samples_per_prompt > 1:
        content["workload"]["samples_per_prompt"] = workload.samples_per_prompt
    content["iterations"] = experiment.iterations
    if experiment.data is not None:
        content["data"] = data_content(experiment.data)
    if experiment.pretrain is not None:
        content[SECTION] = pretrain_content(experiment.pretrain)
    if experiment.reward is not None:
        content["reward"] = experiment.reward
    if experiment.rewards:
        content["rewards"] = rewards_content(experiment.rewards)
    if experiment.evaluation is not None:
        content["evaluation"] = evaluation_content(experiment.evaluation)
    content["hyperparameters"] = dict(experiment.hyperparameters or {})
    content["sampling"] = sampling_content(experiment.sampling)
    content["dtype"] = experiment.dtype
    content["seed"] = experiment.seed
    if experiment.training_backend != OWN:
        content["training_backend"] = experiment.training_backend
    if experiment.cluster is not None:
        content["cluster"] = cluster_content(experiment.cluster)
    if experiment.constraints != NO_CONSTRAINTS:
        content["constraints"] = constraints_content(experiment.constraints)
    return content
