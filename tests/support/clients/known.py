"""What the scripted model of test_server_other_clients.py says, to clients of all kinds."""

MODEL = "talker"
SAID = "alpha beta gamma"  # to a prompt that ends with S
TOOL_CALL = ("f", {"x": 1})  # to a prompt that ends with T, if it is offered TOOL
PARAMETERS = {"type": "object", "properties": {"x": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}
SCHEMA = {  # whose only instance is {"a": 1}
    "type": "object",
    "properties": {"a": {"type": "integer", "enum": [1]}},
    "required": ["a"],
    "additionalProperties": False,
}
SCHEMA_FORM = {
    "type": "json_schema",
    "json_schema": {"name": "r", "strict": True, "schema": SCHEMA},
}


def user(text):
    return [{"role": "user", "content": text}]
