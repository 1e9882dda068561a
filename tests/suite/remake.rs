//! GGUFs that differ from a good one in what a test says, or are made from its parts.

use std::fs::File;
use std::path::Path;

use hae::llama::gguf::{Gguf, TensorType, Value, Writer};

/// A GGUF in memory.
#[derive(Clone)]
pub struct Remake {
    pub keys: Vec<(String, Value)>,
    pub tensors: Vec<Tensor>,
}

#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub kind: TensorType,
    /// Fastest first.
    pub dims: Vec<u64>,
    pub data: Vec<u8>,
}

impl Tensor {
    /// Seeded values in -0.05..0.05: what an untrained layer looks like.
    pub fn random(name: &str, dims: &[u64]) -> Self {
        let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3_u64)
        });
        let value = |i: u64| {
            let x = (seed ^ i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            ((x ^ x >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f32 / (1u64 << 24) as f32
        };
        let n: u64 = dims.iter().product();
        Tensor::f32(name, dims, (0..n).map(|i| (value(i) - 0.5) * 0.1))
    }

    pub fn ones(name: &str, n: u64) -> Self {
        Tensor::f32(name, &[n], (0..n).map(|_| 1.0))
    }

    /// Multiplies the values, which are F32.
    pub fn scale(&mut self, by: f32) {
        assert_eq!(self.kind, TensorType::F32);
        for value in self.data.as_chunks_mut().0 {
            *value = (f32::from_le_bytes(*value) * by).to_le_bytes();
        }
    }

    fn f32(name: &str, dims: &[u64], values: impl Iterator<Item = f32>) -> Self {
        Tensor {
            name: name.to_owned(),
            kind: TensorType::F32,
            dims: dims.to_vec(),
            data: values.flat_map(f32::to_le_bytes).collect(),
        }
    }
}

impl Remake {
    pub fn read(path: &Path) -> Self {
        let gguf = Gguf::open(path).unwrap();
        let bytes = std::fs::read(path).unwrap();
        let keys = gguf.keys().into_iter();
        Remake {
            keys: keys
                .map(|key| {
                    let value = gguf.get(&key).unwrap();
                    (key, value)
                })
                .collect(),
            tensors: gguf
                .tensors()
                .into_iter()
                .map(|t| Tensor {
                    data: bytes[t.offset as usize..][..t.bytes as usize].to_vec(),
                    name: t.name,
                    kind: t.kind,
                    dims: t.dims,
                })
                .collect(),
        }
    }

    pub fn set(&mut self, key: &str, value: Value) {
        match self.keys.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = value,
            None => self.keys.push((key.to_owned(), value)),
        }
    }

    pub fn set_text(&mut self, key: &str, value: &str) {
        self.set(key, Value::Text(value.to_owned()))
    }

    pub fn set_u32(&mut self, key: &str, value: u32) {
        self.set(key, Value::Unsigned(value.into()))
    }

    pub fn set_f32(&mut self, key: &str, value: f32) {
        self.set(key, Value::Float(value.into()))
    }

    pub fn drop_key(&mut self, key: &str) {
        self.keys.retain(|(k, _)| k != key);
    }

    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|t| t.name == name).unwrap()
    }

    pub fn write(&self, path: &Path) {
        let mut writer = Writer::new(path).unwrap();
        for (key, value) in &self.keys {
            write_value(&mut writer, key, value);
        }
        for t in &self.tensors {
            writer.add_tensor(&t.name, t.kind, &t.dims).unwrap();
        }
        let mut out = writer.begin(File::create(path).unwrap()).unwrap();
        for t in &self.tensors {
            out.write(&t.data).unwrap();
            out.end_tensor().unwrap();
        }
        out.finish().unwrap();
    }
}

/// Integers are written as u32, in arrays as i32.
fn write_value(writer: &mut Writer, key: &str, value: &Value) {
    match value {
        Value::Unsigned(n) => writer.set_u32(key, u32::try_from(*n).unwrap()),
        Value::Signed(n) => writer.set_u32(key, u32::try_from(*n).unwrap()),
        Value::Float(x) => writer.set_f32(key, *x as f32),
        Value::Bool(b) => writer.set_bool(key, *b),
        Value::Text(text) => writer.set_text(key, text),
        Value::Array(values) => match values.first() {
            Some(Value::Text(_)) => {
                let texts: Vec<String> = values.iter().map(text_of).collect();
                writer.set_text_array(key, &texts)
            }
            Some(Value::Float(_)) => {
                let numbers: Vec<f32> = values.iter().map(|v| number_of(v) as f32).collect();
                writer.set_f32_array(key, &numbers)
            }
            _ => {
                let numbers: Vec<i32> = values.iter().map(|v| number_of(v) as i32).collect();
                writer.set_i32_array(key, &numbers)
            }
        },
    }
    .unwrap();
}

fn text_of(value: &Value) -> String {
    match value {
        Value::Text(text) => text.clone(),
        other => panic!("{other:?}"),
    }
}

fn number_of(value: &Value) -> f64 {
    match value {
        Value::Float(x) => *x,
        Value::Signed(n) => *n as f64,
        Value::Unsigned(n) => *n as f64,
        other => panic!("{other:?}"),
    }
}
