//! The arithmetic, in plain float32 loops.

use crate::checkpoint::Config;
use std::thread;

/// RMSNorm of every run of as many numbers as there are weights: x / rms(x) * weight.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(weight.len()) {
        let squares: f32 = row.iter().map(|x| x * x).sum();
        let scale = 1.0 / (squares / row.len() as f32 + eps).sqrt();
        out.extend(row.iter().zip(weight).map(|(x, w)| w * (x * scale)));
    }
    out
}

pub fn add(mut x: Vec<f32>, y: &[f32]) -> Vec<f32> {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    x
}

/// x · weightᵀ for x (rows, inputs) and weight (outputs, inputs); every core takes its share of the rows.
pub fn product(x: &[f32], weight: &[f32], inputs: usize) -> Vec<f32> {
    let (rows, outputs) = (x.len() / inputs, weight.len() / inputs);
    let share = rows / thread::available_parallelism().map_or(1, |cores| cores.get()) + 1;
    let mut out = vec![0.0; rows * outputs];
    thread::scope(|scope| {
        for (x, out) in x.chunks(share * inputs).zip(out.chunks_mut(share * outputs)) {
            scope.spawn(move || {
                // A row of the weight stays in the cache while all tokens meet it.
                for (o, weight) in weight.chunks_exact(inputs).enumerate() {
                    for (x, out) in x.chunks_exact(inputs).zip(out.chunks_exact_mut(outputs)) {
                        out[o] = dot(x, weight);
                    }
                }
            });
        }
    });
    out
}

/// The sum of products, in sixteen partial sums that the compiler turns into vector instructions.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0; 16];
    let (a, b) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a.zip(b) {
        for i in 0..16 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// softmax(q kᵀ / √head_dim) v over the tokens up to each token's own, every row of the batch by itself.
///
/// q is (batch, token, head, head_dim), k and v are (batch, token, kv head, head_dim); query head h reads key and
/// value head h / (heads / kv_heads). Returns (batch, token, head, head_dim).
pub fn attend(config: &Config, tokens: usize, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
    let Config { heads, kv_heads, head_dim, .. } = *config;
    let (q_size, kv_size) = (heads * head_dim, kv_heads * head_dim);
    let scale = (1.0 / (head_dim as f64).sqrt()) as f32;
    let mut out = vec![0.0; q.len()];
    for (row, out) in out.chunks_exact_mut(q_size).enumerate() {
        let first = row - row % tokens; // the row where this row's sequence begins
        for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let at = |past: usize| past * kv_size + head / (heads / kv_heads) * head_dim;
            let query = &q[row * q_size + head * head_dim..][..head_dim];
            let score = |past| dot(query, &k[at(past)..][..head_dim]) * scale;
            let probs = softmax((first..=row).map(score).collect());
            for (past, prob) in (first..=row).zip(probs) {
                let value = &v[at(past)..][..head_dim];
                out.iter_mut().zip(value).for_each(|(out, value)| *out += prob * value);
            }
        }
    }
    out
}

fn softmax(mut x: Vec<f32>) -> Vec<f32> {
    let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    x.iter_mut().for_each(|x| *x = (*x - largest).exp());
    let sum: f32 = x.iter().sum();
    x.iter_mut().for_each(|x| *x /= sum);
    x
}
