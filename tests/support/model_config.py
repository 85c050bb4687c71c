"""Triton's `ModelConfig`, as far as this package writes it, for protobuf's own parser of text format.

Names and types are those of model_config.proto in github.com/triton-inference-server/common. The slow tests parse the
same files with the original messages of `tritonclient`.
"""

from functools import cache

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

ENUMS = {
    "DataType": ("TYPE_INVALID", "TYPE_UINT8", "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_STRING"),
    "Kind": ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"),
}
# A list is a repeated field; map fields are repeated entries, which is how text format writes them, too.
MESSAGES = {
    "Tensor": {"name": "string", "data_type": "DataType", "dims": ["int64"], "label_filename": "string"},
    "Latest": {"num_versions": "uint32"},
    "VersionPolicy": {"latest": "Latest"},
    "InstanceGroup": {"count": "int32", "kind": "Kind"},
    "DynamicBatching": {"preferred_batch_size": ["int32"], "max_queue_delay_microseconds": "uint64"},
    "WarmupInput": {"data_type": "DataType", "dims": ["int64"], "zero_data": "bool", "input_data_file": "string"},
    "WarmupEntry": {"key": "string", "value": "WarmupInput"},
    "Warmup": {"name": "string", "batch_size": "uint32", "inputs": ["WarmupEntry"]},
    "Parameter": {"string_value": "string"},
    "ParameterEntry": {"key": "string", "value": "Parameter"},
    "ModelConfig": {
        "name": "string",
        "backend": "string",
        "default_model_filename": "string",
        "max_batch_size": "int32",
        "input": ["Tensor"],
        "output": ["Tensor"],
        "version_policy": "VersionPolicy",
        "instance_group": ["InstanceGroup"],
        "dynamic_batching": "DynamicBatching",
        "model_warmup": ["Warmup"],
        "parameters": ["ParameterEntry"],
    },
}


def parse_config(text):
    """Return the `ModelConfig` in a text; raises `ParseError` for anything else."""
    return text_format.Parse(text, _model_config()())


def parameters(config):
    """Return the parameters of a configuration as a dict."""
    return {entry.key: entry.value.string_value for entry in config.parameters}


@cache
def _model_config():
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="triton", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields.items(), 1):
            _add_field(message, field, kind, number)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("triton.ModelConfig"))


def _add_field(message, name, kind, number):
    proto = descriptor_pb2.FieldDescriptorProto
    is_repeated = isinstance(kind, list)
    kind = kind[0] if is_repeated else kind
    label = proto.LABEL_REPEATED if is_repeated else proto.LABEL_OPTIONAL
    field = message.field.add(name=name, number=number, label=label)
    if kind in ENUMS:
        field.type, field.type_name = proto.TYPE_ENUM, f".triton.{kind}"
    elif kind in MESSAGES:
        field.type, field.type_name = proto.TYPE_MESSAGE, f".triton.{kind}"
    else:
        field.type = getattr(proto, f"TYPE_{kind.upper()}")
