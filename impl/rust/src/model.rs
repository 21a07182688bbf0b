//! The forward pass of Qwen3 on whole rows of tokens, in float32.
//!
//! An activation is one `Vec<f32>` in row-major order, (batch, token, feature) or (batch, token, head, head_dim).
//! Every value that the reference has a site for is put into the dump under the name of that site.

use crate::checkpoint::{Checkpoint, Config};
use crate::dump::Dump;
use crate::operations::{add, attend, product, rms_norm};
use crate::Result;

/// Run the model on `rows` of equally many token ids, and record all of it.
pub fn forward(config: &Config, weights: &Checkpoint, rows: &[Vec<usize>], dump: &mut Dump) -> Result<()> {
    let table = weights.read("model.embed_tokens.weight", &[config.vocab, config.hidden])?;
    let ids = rows.iter().flatten();
    let embedded: Vec<f32> = ids.flat_map(|id| &table[id * config.hidden..][..config.hidden]).copied().collect();
    let mut run = Run { config, weights, dump, prefix: "model".to_string() };
    run.put("embed_tokens", &embedded);

    let angles = Angles::new(config, rows[0].len());
    let mut x = embedded;
    for layer in 0..config.layers {
        run.prefix = format!("model.layers.{layer}");
        x = run.layer(x, &angles)?;
        run.dump.put(run.prefix.clone(), &x);
    }
    run.prefix = "model".to_string();
    let x = run.norm("norm", &x)?;
    let head = match config.tied {
        true => table,
        false => weights.read("lm_head.weight", &[config.vocab, config.hidden])?,
    };
    dump.put("lm_head".to_string(), &product(&x, &head, config.hidden));
    Ok(())
}

/// The cosine and sine of every token's angle in every pair of a head: (token, head_dim / 2).
struct Angles {
    tokens: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Angles {
    fn new(config: &Config, tokens: usize) -> Angles {
        let frequency = |i| 1.0 / config.theta.powf((2 * i) as f32 / config.head_dim as f32);
        let frequencies: Vec<f32> = (0..config.head_dim / 2).map(frequency).collect();
        let angles = (0..tokens).flat_map(|t| frequencies.iter().map(move |f| t as f32 * f));
        let (cos, sin) = angles.map(|angle| (angle.cos(), angle.sin())).unzip();
        Angles { tokens, cos, sin }
    }
}

/// The model at work on one module, whose name is `prefix`.
struct Run<'a> {
    config: &'a Config,
    weights: &'a Checkpoint,
    dump: &'a mut Dump,
    prefix: String,
}

impl Run<'_> {
    /// One decoder layer on the residual stream.
    fn layer(&mut self, x: Vec<f32>, angles: &Angles) -> Result<Vec<f32>> {
        let normed = self.norm("input_layernorm", &x)?;
        let x = add(x, &self.attention(&normed, angles)?);
        self.put("resid_mid", &x);
        let normed = self.norm("post_attention_layernorm", &x)?;
        Ok(add(x, &self.mlp(&normed)?))
    }

    /// Causal attention with grouped queries, a norm on every head, and RoPE.
    fn attention(&mut self, x: &[f32], angles: &Angles) -> Result<Vec<f32>> {
        let Config { hidden, heads, kv_heads, head_dim, bias, .. } = *self.config;
        let q = self.linear("self_attn.q_proj", x, [heads * head_dim, hidden], bias)?;
        let q = self.head_norm("self_attn.q_norm", &q)?;
        let k = self.linear("self_attn.k_proj", x, [kv_heads * head_dim, hidden], bias)?;
        let k = self.head_norm("self_attn.k_norm", &k)?;
        let v = self.linear("self_attn.v_proj", x, [kv_heads * head_dim, hidden], bias)?;
        let q = self.rotate("self_attn.q_rope", q, heads, angles);
        let k = self.rotate("self_attn.k_rope", k, kv_heads, angles);
        let context = attend(self.config, angles.tokens, &q, &k, &v);
        self.put_heads("self_attn.context", &context);
        self.linear("self_attn.o_proj", &context, [hidden, heads * head_dim], bias)
    }

    /// SwiGLU: down(silu(gate(x)) * up(x)).
    fn mlp(&mut self, x: &[f32]) -> Result<Vec<f32>> {
        let Config { hidden, intermediate, .. } = *self.config;
        let gate = self.linear("mlp.gate_proj", x, [intermediate, hidden], false)?;
        let activated: Vec<f32> = gate.iter().map(|x| x / (1.0 + (-x).exp())).collect();
        self.put("mlp.act_fn", &activated);
        let up = self.linear("mlp.up_proj", x, [intermediate, hidden], false)?;
        let product: Vec<f32> = activated.iter().zip(&up).map(|(a, b)| a * b).collect();
        self.put("mlp.product", &product);
        self.linear("mlp.down_proj", &product, [hidden, intermediate], false)
    }

    /// RMSNorm of every token.
    fn norm(&mut self, name: &str, x: &[f32]) -> Result<Vec<f32>> {
        let weight = self.weights.read(&format!("{}.{name}.weight", self.prefix), &[self.config.hidden])?;
        let out = rms_norm(x, &weight, self.config.eps);
        self.put(name, &out);
        Ok(out)
    }

    /// RMSNorm of every head of every token.
    fn head_norm(&mut self, name: &str, x: &[f32]) -> Result<Vec<f32>> {
        let weight = self.weights.read(&format!("{}.{name}.weight", self.prefix), &[self.config.head_dim])?;
        let out = rms_norm(x, &weight, self.config.eps);
        self.put_heads(name, &out);
        Ok(out)
    }

    /// x · weightᵀ + bias for a weight of shape (outputs, inputs).
    fn linear(&mut self, name: &str, x: &[f32], shape: [usize; 2], bias: bool) -> Result<Vec<f32>> {
        let path = format!("{}.{name}", self.prefix);
        let mut out = product(x, &self.weights.read(&format!("{path}.weight"), &shape)?, shape[1]);
        if bias {
            let bias = self.weights.read(&format!("{path}.bias"), &shape[..1])?;
            for row in out.chunks_exact_mut(shape[0]) {
                row.iter_mut().zip(&bias).for_each(|(x, b)| *x += b);
            }
        }
        self.dump.put(path, &out);
        Ok(out)
    }

    /// RoPE: turn each pair (x[i], x[i + head_dim/2]) of every head by the angle of its token.
    fn rotate(&mut self, name: &str, mut x: Vec<f32>, heads: usize, angles: &Angles) -> Vec<f32> {
        let (head_dim, half) = (self.config.head_dim, self.config.head_dim / 2);
        for (row, token) in x.chunks_exact_mut(heads * head_dim).enumerate() {
            let position = row % angles.tokens;
            for head in token.chunks_exact_mut(head_dim) {
                for i in 0..half {
                    let (cos, sin) = (angles.cos[position * half + i], angles.sin[position * half + i]);
                    let (first, second) = (head[i], head[i + half]);
                    head[i] = first * cos - second * sin;
                    head[i + half] = second * cos + first * sin;
                }
            }
        }
        self.put_heads(name, &x);
        x
    }

    fn put(&mut self, name: &str, values: &[f32]) {
        self.dump.put(format!("{}.{name}", self.prefix), values);
    }

    fn put_heads(&mut self, name: &str, values: &[f32]) {
        self.dump.put_heads(format!("{}.{name}", self.prefix), values, self.config.head_dim);
    }
}
