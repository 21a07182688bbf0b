//! What the port tells parity: the value at every site, in one safetensors file.

use crate::Result;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

struct Site {
    name: String,
    dims: &'static str,
    shape: Vec<usize>,
    values: Vec<f32>,
}

/// The sites recorded so far, and the token ids that they belong to.
pub struct Dump {
    token_ids: String,
    batch: usize,
    tokens: usize,
    sites: Vec<Site>,
}

impl Dump {
    pub fn new(rows: &[Vec<usize>]) -> Dump {
        Dump { token_ids: format!("{rows:?}"), batch: rows.len(), tokens: rows[0].len(), sites: Vec::new() }
    }

    /// Record an activation (batch, token, feature).
    pub fn put(&mut self, name: String, values: &[f32]) {
        let features = values.len() / (self.batch * self.tokens);
        self.push(name, "batch token feature", vec![self.batch, self.tokens, features], values);
    }

    /// Record an activation that has heads of size `head_dim`: (batch, token, head, head_dim).
    pub fn put_heads(&mut self, name: String, values: &[f32], head_dim: usize) {
        let heads = values.len() / (self.batch * self.tokens * head_dim);
        self.push(name, "batch token head head_dim", vec![self.batch, self.tokens, heads, head_dim], values);
    }

    fn push(&mut self, name: String, dims: &'static str, shape: Vec<usize>, values: &[f32]) {
        self.sites.push(Site { name, dims, shape, values: values.to_vec() });
    }

    /// Write it all: the length of the header, the header padded to a multiple of eight, the data.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut header = self.header();
        while header.len() % 8 != 0 {
            header.push(' ');
        }
        let mut file = BufWriter::new(File::create(path).map_err(|e| format!("{}: {e}", path.display()))?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        for value in self.sites.iter().flat_map(|site| &site.values) {
            file.write_all(&value.to_le_bytes())?;
        }
        Ok(file.flush()?)
    }

    fn header(&self) -> String {
        let dims: Vec<String> = self.sites.iter().map(|site| format!("{:?}:{:?}", site.name, site.dims)).collect();
        // {:?} puts a text in quotes and escapes the quotes in it, as JSON wants them.
        let mut header = format!(
            r#"{{"__metadata__":{{"parity.producer":"impl/rust 0.1.0","parity.token_ids":{:?},"parity.dims":{:?}}}"#,
            self.token_ids,
            format!("{{{}}}", dims.join(","))
        );
        let mut end = 0;
        for Site { name, shape, values, .. } in &self.sites {
            let begin = end;
            end += values.len() * 4;
            header += &format!(r#","{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#);
        }
        header + "}"
    }
}
