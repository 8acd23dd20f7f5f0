//! JSON as config.json has it.

use std::borrow::Cow;

/// `text` with the words `Infinity`, `-Infinity` and `NaN`, which Python writes and JSON does not have, in the form of
/// newer writers: `{"__float__": "Infinity"}`.
pub(crate) fn with_named_floats(text: &str) -> Cow<'_, str> {
    const WORDS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];
    if !WORDS.iter().any(|word| text.contains(word)) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 64);
    let mut rest = text;
    let mut in_string = false;
    while let Some(next) = rest.chars().next() {
        if !in_string && let Some(word) = WORDS.iter().find(|word| rest.starts_with(**word)) {
            out.push_str(&format!(r#"{{"__float__": "{word}"}}"#));
            rest = &rest[word.len()..];
            continue;
        }
        let mut length = next.len_utf8();
        if in_string && next == '\\' {
            // The escaped character too: it may be a quote.
            length += rest[length..].chars().next().map_or(0, char::len_utf8);
        } else if next == '"' {
            in_string = !in_string;
        }
        out.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_outside_strings_are_replaced() {
        let text = r#"{"a": [0.0, Infinity], "b": "an \" Infinity", "NaN": -Infinity}"#;
        let expected =
            r#"{"a": [0.0, {"__float__": "Infinity"}], "b": "an \" Infinity", "NaN": {"__float__": "-Infinity"}}"#;
        assert_eq!(with_named_floats(text), expected);
        assert!(matches!(with_named_floats("{}"), Cow::Borrowed(_)));
    }
}
