//! Qwen3 in float32, in Rust, with nothing but the standard library: a worked example of a port.
//!
//!     parity record --prompt "The capital of France is" -o ref.h5      # also writes ref.tokens.txt
//!     qwen3 parity/models/tiny-qwen3 ref.tokens.txt port.safetensors
//!     parity diff ref.h5 port.safetensors
//!
//! `model` is the port and `operations` its arithmetic; `checkpoint` and `json` read what it runs on, `dump` writes what parity reads.

mod checkpoint;
mod dump;
mod json;
mod model;
mod operations;

use checkpoint::{Checkpoint, Config};
use dump::Dump;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

/// Whatever goes wrong is a text for the user.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    match run(&std::env::args().collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &[String]) -> Result<()> {
    if arguments.len() != 4 {
        return Err("usage: qwen3 MODEL_DIR TOKENS.txt OUT.safetensors".into());
    }
    let model_dir = Path::new(&arguments[1]);
    let config = Config::read(&model_dir.join("config.json"))?;
    let rows = read_tokens(Path::new(&arguments[2]), config.vocab)?;
    let mut dump = Dump::new(&rows);
    model::forward(&config, &Checkpoint::open(model_dir)?, &rows, &mut dump)?;
    dump.write(Path::new(&arguments[3]))
}

/// The rows of the batch: one line for each, ids separated by spaces.
fn read_tokens(path: &Path, vocab: usize) -> Result<Vec<Vec<usize>>> {
    let text = fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut rows: Vec<Vec<usize>> = Vec::new();
    for line in text.lines() {
        rows.push(line.split_whitespace().map(str::parse).collect::<std::result::Result<_, _>>()?);
    }
    if rows.is_empty() || rows[0].is_empty() || rows.iter().any(|row| row.len() != rows[0].len()) {
        return Err(format!("{}: needs rows of equally many token ids", path.display()).into());
    }
    match rows.iter().flatten().find(|id| **id >= vocab) {
        Some(id) => Err(format!("{}: token id {id} is outside the vocabulary of {vocab}", path.display()).into()),
        None => Ok(rows),
    }
}
