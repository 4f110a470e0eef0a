// OpenAI's JavaScript client: answers whole and streamed, log-probabilities, tools, JSON, responses.
import assert from "node:assert/strict";
import OpenAI from "openai";

const model = "talker";
const said = "alpha beta gamma";
const parameters = { type: "object", properties: { x: { type: "integer" } } };
const user = (content) => [{ role: "user", content }];
const api = new OpenAI({ maxRetries: 0 });

const models = await api.models.list();
assert.deepEqual(models.data.map((one) => one.id), [model]);

const chat = { model, messages: user("S"), logprobs: true, top_logprobs: 2 };
const whole = await api.chat.completions.create(chat);
assert.equal(whole.choices[0].message.content, said);
assert.equal(whole.choices[0].logprobs.content.length, 4);
let text = "";
for await (const piece of await api.chat.completions.create({ ...chat, stream: true })) {
  text += piece.choices[0]?.delta?.content ?? "";
}
assert.equal(text, said);

const runner = api.chat.completions.runTools({
  model,
  messages: user("T"),
  tools: [{ type: "function", function: { name: "f", parameters, parse: JSON.parse, function: ({ x }) => (x === 1 ? "S" : "") } }],
});
assert.equal(await runner.finalContent(), said);

const schema = { type: "object", properties: { a: { type: "integer", enum: [1] } }, required: ["a"], additionalProperties: false };
const response_format = { type: "json_schema", json_schema: { name: "r", strict: true, schema } };
const json = await api.chat.completions.parse({ model, messages: user("S"), response_format });
assert.deepEqual(json.choices[0].message.parsed ?? JSON.parse(json.choices[0].message.content), { a: 1 });

const stream = api.responses.stream({ model, input: "S" });
assert.equal((await stream.finalResponse()).output_text, said);
await assert.rejects(api.chat.completions.create({ model: "gpt", messages: user("S") }), OpenAI.NotFoundError);
await assert.rejects(api.chat.completions.create({ ...chat, n: 2 }), OpenAI.BadRequestError);
const leaving = await api.chat.completions.create({ ...chat, stream: true });
leaving.controller.abort();
