//! Typed access to a JSON object, with errors that name the field.

use serde_json::{Map, Value};

use crate::NnError;

/// No size in a config is larger: products of two of them stay far inside a machine word.
const LARGEST: u64 = 1 << 30;

/// A JSON object and the way to it (`attn[0].`).
pub struct Fields<'a> {
    map: &'a Map<String, Value>,
    prefix: String,
}

impl<'a> Fields<'a> {
    pub fn new(map: &'a Map<String, Value>, prefix: impl Into<String>) -> Self {
        Self { map, prefix: prefix.into() }
    }

    /// All fields.
    pub fn map(&self) -> &'a Map<String, Value> {
        self.map
    }

    /// The full name of a field.
    pub fn name(&self, field: &str) -> String {
        format!("{}{field}", self.prefix)
    }

    /// The value of a field that is there and not null.
    pub fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// Whether the field is given as null.
    pub fn is_null(&self, field: &str) -> bool {
        self.map.get(field).is_some_and(Value::is_null)
    }

    /// Whether the field is not given.
    pub fn is_absent(&self, field: &str) -> bool {
        !self.map.contains_key(field)
    }

    pub fn error(&self, field: &str, message: impl Into<String>) -> NnError {
        NnError::config(self.name(field), message)
    }

    fn wrong(&self, field: &str, expected: &str, found: &Value) -> NnError {
        self.error(field, format!("expected {expected}, found {found}"))
    }

    /// `null` where a value is needed is an error, not the default.
    fn absent(&self, field: &str) -> Result<bool, NnError> {
        match self.map.get(field) {
            None => Ok(true),
            Some(Value::Null) => Err(self.error(field, "may not be null")),
            Some(_) => Ok(false),
        }
    }

    pub fn optional_usize(&self, field: &str) -> Result<Option<usize>, NnError> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        match value.as_u64() {
            Some(n @ 1..=LARGEST) => Ok(Some(n as usize)),
            _ => Err(self.wrong(field, &format!("a whole number from 1 to {LARGEST}"), value)),
        }
    }

    pub fn usize(&self, field: &str, default: usize) -> Result<usize, NnError> {
        if self.absent(field)? {
            return Ok(default);
        }
        Ok(self.optional_usize(field)?.unwrap_or(default))
    }

    /// A size for which null has a meaning; `default` where the field is not given.
    pub fn usize_or_null(&self, field: &str, default: usize) -> Result<Option<usize>, NnError> {
        if self.is_absent(field) { Ok(Some(default)) } else { self.optional_usize(field) }
    }

    pub fn required_usize(&self, field: &str) -> Result<usize, NnError> {
        self.optional_usize(field)?.ok_or_else(|| self.error(field, "is missing"))
    }

    /// A token id: 0 is one.
    pub fn optional_id(&self, field: &str) -> Result<Option<u32>, NnError> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        match value.as_u64().and_then(|n| u32::try_from(n).ok()) {
            Some(id) => Ok(Some(id)),
            None => Err(self.wrong(field, "a token id or null", value)),
        }
    }

    pub fn optional_f64(&self, field: &str) -> Result<Option<f64>, NnError> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        match value.as_f64().filter(|x| x.is_finite()) {
            Some(x) => Ok(Some(x)),
            None => Err(self.wrong(field, "a number", value)),
        }
    }

    /// A number for which null has a meaning; `default` where the field is not given.
    pub fn f64_or_null(&self, field: &str, default: f64) -> Result<Option<f64>, NnError> {
        if self.is_absent(field) { Ok(Some(default)) } else { self.optional_f64(field) }
    }

    /// Two numbers, the second not below the first. Either may be infinite, as `{"__float__": "Infinity"}`.
    pub fn range(&self, field: &str, default: (f64, f64)) -> Result<(f64, f64), NnError> {
        if self.absent(field)? {
            return Ok(default);
        }
        let number = |value: &Value| match value.get("__float__").and_then(Value::as_str) {
            Some("Infinity") => Some(f64::INFINITY),
            Some("-Infinity") => Some(f64::NEG_INFINITY),
            Some(_) => None,
            None => value.as_f64(),
        };
        let value = &self.map[field];
        match value.as_array().map(|pair| pair.iter().map(number).collect::<Vec<_>>()).as_deref() {
            Some([Some(low), Some(high)]) if low <= high => Ok((*low, *high)),
            _ => Err(self.wrong(field, "two numbers, the smaller first", value)),
        }
    }

    /// A number above 0.
    pub fn positive(&self, field: &str, default: f64) -> Result<f64, NnError> {
        if self.absent(field)? {
            return Ok(default);
        }
        match self.optional_f64(field)? {
            Some(x) if x > 0.0 => Ok(x),
            _ => Err(self.error(field, "must be above 0")),
        }
    }

    pub fn bool(&self, field: &str, default: bool) -> Result<bool, NnError> {
        if self.absent(field)? {
            return Ok(default);
        }
        match self.get(field) {
            Some(Value::Bool(value)) => Ok(*value),
            Some(value) => Err(self.wrong(field, "true or false", value)),
            None => Ok(default),
        }
    }

    pub fn optional_str(&self, field: &str) -> Result<Option<&'a str>, NnError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => Err(self.wrong(field, "a string", value)),
        }
    }

    /// A list of whole numbers.
    pub fn list(&self, field: &str) -> Result<Vec<usize>, NnError> {
        let Some(value) = self.get(field) else {
            return Err(self.error(field, "is missing"));
        };
        let wrong = || self.wrong(field, "a list of layer numbers", value);
        value
            .as_array()
            .ok_or_else(wrong)?
            .iter()
            .map(|item| item.as_u64().filter(|n| *n <= LARGEST).map(|n| n as usize).ok_or_else(wrong))
            .collect()
    }
}
