// What a shape {layers, d, nHeads, nKv} is made of, as `convention` counts: gqa_jax.costs.

export const attentionParams = (shape, model) => 2 * shape.layers * shape.d * model.head_dim * (shape.nHeads + shape.nKv);
export const ffnParams = (shape, convention) => convention.ffn_matrices * shape.layers * shape.d * ((8 * shape.d) / 3);
export const normParams = (shape, convention) => (convention.norms ? (2 * shape.layers + 1) * shape.d : 0);
export const embeddingParams = (shape, model, convention) => (convention.embedding ? shape.d * model.vocab_size : 0);
export const cacheValues = (shape, model, tokens) => 2 * tokens * shape.layers * model.head_dim * shape.nKv;

/** Parameters without embeddings. */
export function innerParams(shape, model, convention) {
  return attentionParams(shape, model) + ffnParams(shape, convention) + normParams(shape, convention);
}

/** Forward FLOPs of a token that sees `keys` keys. */
export function forwardFlops(shape, model, convention, keys) {
  const matrices = attentionParams(shape, model) + ffnParams(shape, convention) + embeddingParams(shape, model, convention);
  return 2 * matrices + 4 * shape.layers * keys * shape.nHeads * model.head_dim;
}
