//! A Hugging Face checkpoint: config.json, and weights in safetensors, in one file or in shards.

use crate::json::Json;
use crate::Result;
use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// The keys of config.json that change the computation.
pub struct Config {
    pub vocab: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    /// A number of its own: heads x head_dim need not equal the hidden size.
    pub head_dim: usize,
    pub eps: f32,
    pub theta: f32,
    /// Whether the head's weights are those of the embedding.
    pub tied: bool,
    /// Whether the projections of attention have a bias.
    pub bias: bool,
}

impl Config {
    /// Read config.json; an error for a feature that this port does not have.
    pub fn read(path: &Path) -> Result<Config> {
        let raw = read_json(path)?;
        let rope = raw.get("rope_parameters").or_else(|| raw.get("rope_scaling")).unwrap_or(&Json::Null);
        let says = |place: &Json, key: &str, wanted: &str| {
            place.get(key).and_then(Json::text).map_or(true, |text| text == wanted)
        };
        let supported = [
            ("model_type", says(&raw, "model_type", "qwen3")),
            ("hidden_act", says(&raw, "hidden_act", "silu")),
            ("rope_type", says(rope, "rope_type", "default") && says(rope, "type", "default")),
            ("use_sliding_window", !raw.get("use_sliding_window").map_or(false, Json::is_true)),
        ];
        if let Some((name, _)) = supported.iter().find(|(_, supported)| !supported) {
            return Err(format!("{}: this port does not implement its setting of {name}", path.display()).into());
        }
        let number = |key: &str| -> Result<f64> {
            let found = raw.get(key).and_then(Json::number);
            found.ok_or_else(|| format!("{}: no number {key:?}", path.display()).into())
        };
        let size = |key: &str| number(key).map(|value| value as usize);
        let theta = raw.get("rope_theta").or_else(|| rope.get("rope_theta")).and_then(Json::number);
        Ok(Config {
            vocab: size("vocab_size")?,
            hidden: size("hidden_size")?,
            intermediate: size("intermediate_size")?,
            layers: size("num_hidden_layers")?,
            heads: size("num_attention_heads")?,
            kv_heads: size("num_key_value_heads")?,
            head_dim: match raw.get("head_dim") {
                Some(_) => size("head_dim")?,
                None => size("hidden_size")? / size("num_attention_heads")?,
            },
            eps: number("rms_norm_eps")? as f32,
            theta: theta.ok_or_else(|| format!("{}: no number \"rope_theta\"", path.display()))? as f32,
            tied: raw.get("tie_word_embeddings").map_or(false, Json::is_true),
            bias: raw.get("attention_bias").map_or(false, Json::is_true),
        })
    }
}

/// Where a tensor lies in its file.
struct Place {
    file: PathBuf,
    dtype: String,
    shape: Vec<usize>,
    begin: u64,
    end: u64,
}

/// The weights: known by name, read from the disk when they are asked for.
pub struct Checkpoint {
    places: HashMap<String, Place>,
}

impl Checkpoint {
    /// Read the headers of model.safetensors, or of the shards that its index names.
    pub fn open(model_dir: &Path) -> Result<Checkpoint> {
        let index = model_dir.join("model.safetensors.index.json");
        let mut files = BTreeSet::from(["model.safetensors".to_string()]);
        if index.exists() {
            let index = read_json(&index)?;
            let map = index.get("weight_map").unwrap_or(&Json::Null);
            files = map.entries().iter().filter_map(|(_, file)| file.text().map(str::to_string)).collect();
        }
        let mut places = HashMap::new();
        for file in files {
            read_header(&model_dir.join(file), &mut places)?;
        }
        Ok(Checkpoint { places })
    }

    /// The numbers of a tensor of this shape, as float32.
    pub fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let place = self.places.get(name).ok_or_else(|| format!("the checkpoint has no {name}"))?;
        if place.shape != shape {
            return Err(format!("{name} has shape {:?}, expected {shape:?}", place.shape).into());
        }
        let mut bytes = vec![0; (place.end - place.begin) as usize];
        let mut file = File::open(&place.file)?;
        file.seek(SeekFrom::Start(place.begin))?;
        file.read_exact(&mut bytes)?;
        let halves = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        match place.dtype.as_str() {
            "F32" => Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()),
            "BF16" => Ok(halves().map(|half| f32::from_bits(u32::from(half) << 16)).collect()),
            "F16" => Ok(halves().map(float16).collect()),
            other => Err(format!("{name} has dtype {other}: this port reads F32, BF16 and F16").into()),
        }
    }
}

/// Enter the tensors of one safetensors file: eight bytes of length, a header in JSON, the data.
fn read_header(path: &Path, places: &mut HashMap<String, Place>) -> Result<()> {
    let mut file = File::open(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    let mut header = String::new();
    file.take(length).read_to_string(&mut header)?;
    for (name, tensor) in Json::parse(&header)?.entries() {
        let numbers = |key| -> Vec<usize> {
            let items = tensor.get(key).map_or(&[][..], Json::items);
            items.iter().filter_map(Json::number).map(|number| number as usize).collect()
        };
        // Whatever has no place in the data is not a tensor but metadata.
        if let [begin, end] = numbers("data_offsets")[..] {
            let data = 8 + length;
            let place = Place {
                file: path.to_path_buf(),
                dtype: tensor.get("dtype").and_then(Json::text).unwrap_or("unknown").to_string(),
                shape: numbers("shape"),
                begin: data + begin as u64,
                end: data + end as u64,
            };
            places.insert(name.clone(), place);
        }
    }
    Ok(())
}

fn read_json(path: &Path) -> Result<Json> {
    let text = fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    Json::parse(&text).map_err(|e| format!("{}: {e}", path.display()).into())
}

/// The float16 with these bits: 1 of sign, 5 of exponent, 10 of mantissa. The result is exact.
fn float16(bits: u16) -> f32 {
    let sign = if bits & 0x8000 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from(bits >> 10 & 0x1f);
    let mantissa = f32::from(bits & 0x3ff);
    match exponent {
        0 => sign * mantissa * 2f32.powi(-24),
        31 if mantissa == 0.0 => sign * f32::INFINITY,
        31 => f32::NAN,
        _ => sign * (1024.0 + mantissa) * 2f32.powi(exponent - 25),
    }
}
