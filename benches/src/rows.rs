//! Lines of JSON that `bench-hopper` and `scripts/peer.py` print, as tables.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::Table;

/// One line. What only one of the programs prints is optional.
#[derive(Clone, Debug, Deserialize)]
struct Row {
    operator: String,
    engine: String,
    shape: [usize; 5],
    /// Heads of queries and keys; those of `shape` where they are not given.
    key_heads: Option<usize>,
    device: String,
    forward_ms: Option<f64>,
    both_ms: Option<f64>,
    peak_bytes: Option<u64>,
    saved_bytes_per_token: Option<f64>,
    step_ms: Option<f64>,
    graph_ms: Option<f64>,
    #[serde(default)]
    floor_ms: Floor,
    #[serde(default)]
    errors: BTreeMap<String, f64>,
    failed: Option<String>,
}

impl Row {
    /// Its size.
    fn case(&self) -> ([usize; 5], usize) {
        (self.shape, self.key_heads.unwrap_or(self.shape[2]))
    }
}

/// Forward, and forward and backward; or of a step.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(untagged)]
enum Floor {
    Both([f64; 2]),
    Step(f64),
    #[default]
    None,
}

const PEER: &str = "peer";

/// The lines of JSON objects in a text, in order; other lines are left out. Of two lines for one case the later counts.
fn rows(text: &str) -> Result<Vec<Row>, String> {
    let mut rows: Vec<Row> = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| line.starts_with('{')) {
        let row: Row = serde_json::from_str(line).map_err(|error| format!("line {}: {error}", i + 1))?;
        let same = |other: &Row| {
            (&other.operator, &other.engine, other.case()) == (&row.operator, &row.engine, row.case())
                && other.device == row.device
                && other.step_ms.is_some() == row.step_ms.is_some()
        };
        match rows.iter_mut().find(|other| same(other)) {
            Some(other) => *other = row,
            None => rows.push(row),
        }
    }
    Ok(rows)
}

fn or_dash(number: Option<f64>, digits: usize) -> String {
    number.map_or_else(|| "–".to_string(), |x| format!("{x:.digits$}"))
}

fn gib(bytes: Option<u64>) -> Option<f64> {
    bytes.map(|bytes| bytes as f64 / (1u64 << 30) as f64)
}

fn head(columns: &[&str]) -> Vec<String> {
    columns.iter().map(ToString::to_string).collect()
}

fn shown(row: &Row) -> [String; 2] {
    let name = match row.engine.as_str() {
        "auto" => row.operator.clone(),
        engine => format!("{} ({engine})", row.operator),
    };
    let (mut shape, key_heads) = (row.shape.map(|x| x.to_string()), row.case().1);
    if key_heads != row.shape[2] {
        shape[2] = format!("{key_heads}/{}", shape[2]);
    }
    [name, shape.join(", ")]
}

/// The worst error of the outputs or gradients.
fn worst(row: &Row) -> String {
    let worst = row.errors.iter().max_by(|a, b| a.1.total_cmp(b.1));
    worst.map_or_else(|| "–".to_string(), |(name, error)| format!("{error:.1e} ({name})"))
}

/// Operators by shape, ours beside the peer's on the same kind of device.
///
/// # Errors
/// A line that is not such a row.
pub fn operators(text: &str) -> Result<Table, String> {
    let rows = rows(text)?;
    let columns = head(&[
        "operator",
        "B, T, H, K, V",
        "forward ms",
        "peer",
        "ratio",
        "forward + backward ms",
        "peer",
        "ratio",
        "floor ms",
        "of the floor",
        "GiB",
        "peer",
        "bytes saved a token",
        "worst error",
        "GPU",
    ]);
    let ours = rows.iter().filter(|row| row.engine != PEER && row.both_ms.is_some());
    let line = |row: &Row| {
        let peer = rows.iter().find(|other| {
            other.engine == PEER
                && (&other.operator, other.case(), &other.device) == (&row.operator, row.case(), &row.device)
        });
        let of_peer = |of: fn(&Row) -> Option<f64>| peer.and_then(of);
        let faster = |of: fn(&Row) -> Option<f64>| Some(of_peer(of)? / of(row)?);
        let (forward, both): (fn(&Row) -> _, fn(&Row) -> _) = (|row| row.forward_ms, |row| row.both_ms);
        let floor = match row.floor_ms {
            Floor::Both([_, both]) => Some(both),
            _ => None,
        };
        let [name, shape] = shown(row);
        vec![
            name,
            shape,
            or_dash(row.forward_ms, 3),
            or_dash(of_peer(forward), 3),
            or_dash(faster(forward), 2),
            or_dash(row.both_ms, 3),
            match peer.and_then(|peer| peer.failed.as_ref()) {
                Some(_) => "fails".to_string(),
                None => or_dash(of_peer(both), 3),
            },
            or_dash(faster(both), 2),
            or_dash(floor, 3),
            or_dash(floor.and_then(|floor| Some(row.both_ms? / floor)), 1),
            or_dash(gib(row.peak_bytes), 2),
            or_dash(of_peer(|row| gib(row.peak_bytes)), 2),
            or_dash(row.saved_bytes_per_token, 0),
            worst(row),
            row.device.clone(),
        ]
    };
    Ok(Table { columns, rows: ours.map(line).collect() })
}

/// Operators by shape on the kernels for any NVIDIA GPU since Ampere, beside what is taken by itself on the same kind of
/// device.
///
/// # Errors
/// A line that is not such a row.
pub fn engines(text: &str) -> Result<Table, String> {
    let rows = rows(text)?;
    let columns = head(&[
        "operator",
        "B, T, H, K, V",
        "mma forward ms",
        "auto",
        "mma ÷ auto",
        "mma forward + backward ms",
        "auto",
        "mma ÷ auto",
        "GiB",
        "auto",
        "worst error of mma",
        "GPU",
    ]);
    let pairs = rows.iter().filter(|row| row.engine == "mma" && row.both_ms.is_some()).filter_map(|mma| {
        let same = |auto: &&Row| {
            auto.engine == "auto"
                && (&auto.operator, auto.case(), &auto.device) == (&mma.operator, mma.case(), &mma.device)
        };
        Some((mma, rows.iter().find(same)?))
    });
    let line = |(mma, auto): (&Row, &Row)| {
        let beside = |of: fn(&Row) -> Option<f64>| {
            let ratio = || Some(of(mma)? / of(auto)?);
            [or_dash(of(mma), 3), or_dash(of(auto), 3), or_dash(ratio(), 2)]
        };
        let [_, shape] = shown(mma);
        let memory = [mma, auto].map(|row| or_dash(gib(row.peak_bytes), 2));
        let times = [beside(|row| row.forward_ms), beside(|row| row.both_ms)].concat();
        [vec![mma.operator.clone(), shape], times, memory.to_vec(), vec![worst(mma), mma.device.clone()]].concat()
    };
    Ok(Table { columns, rows: pairs.map(line).collect() })
}

/// Steps of one token.
///
/// # Errors
/// A line that is not such a row.
pub fn steps(text: &str) -> Result<Table, String> {
    let columns =
        head(&["operator", "B, T, H, K, V", "ms", "in a graph", "floor", "of the floor", "worst error", "GPU"]);
    let rows = rows(text)?.into_iter().filter(|row| row.step_ms.is_some()).map(|row| {
        let floor = match row.floor_ms {
            Floor::Step(floor) => Some(floor),
            _ => None,
        };
        let [name, shape] = shown(&row);
        let over = floor.and_then(|floor| Some(row.graph_ms? / floor));
        let numbers = [or_dash(row.step_ms, 4), or_dash(row.graph_ms, 4), or_dash(floor, 4), or_dash(over, 2)];
        [vec![name, shape], numbers.to_vec(), vec![worst(&row), row.device.clone()]].concat()
    });
    Ok(Table { columns, rows: rows.collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
a line for readers
{"operator":"gla","engine":"auto","shape":[1,2,3,4,5],"device":"G","forward_ms":1.0,"both_ms":9.0,"peak_bytes":1073741824}
{"operator":"gla","engine":"auto","shape":[1,2,3,4,5],"device":"G","forward_ms":1.0,"both_ms":2.0,"peak_bytes":1073741824,"saved_bytes_per_token":0.0,"floor_ms":[0.5,1.0],"errors":{"o":1e-3,"g":4e-3}}
{"operator":"gla","engine":"mma","shape":[1,2,3,4,5],"device":"H","forward_ms":1.0,"both_ms":2.0}
{"operator":"gla","engine":"peer","shape":[1,2,3,4,5],"device":"G","forward_ms":3.0,"both_ms":5.0,"peak_bytes":2147483648}
{"operator":"gla","engine":"auto","shape":[1,2,3,4,5],"key_heads":1,"device":"G","forward_ms":1.0,"both_ms":7.0}
{"operator":"gla","engine":"auto","shape":[1,1,3,4,5],"key_heads":3,"device":"G","step":true,"step_ms":0.2,"graph_ms":0.1,"floor_ms":0.08,"errors":{"o":1e-3}}
"#;

    #[test]
    fn ours_stand_beside_the_peer_on_the_same_device() {
        let table = operators(TEXT).unwrap();
        let lines: Vec<String> = table.rows.iter().map(|row| row.join("|")).collect();
        assert_eq!(
            lines,
            [
                "gla|1, 2, 3, 4, 5|1.000|3.000|3.00|2.000|5.000|2.50|1.000|2.0|1.00|2.00|0|4.0e-3 (g)|G",
                "gla (mma)|1, 2, 3, 4, 5|1.000|–|–|2.000|–|–|–|–|–|–|–|–|H",
                "gla|1, 2, 1/3, 4, 5|1.000|–|–|7.000|–|–|–|–|–|–|–|–|G",
            ]
        );
        assert!(table.rows.iter().all(|row| row.len() == table.columns.len()));
    }

    #[test]
    fn kernels_since_ampere_stand_beside_what_the_same_device_takes() {
        let mma = |device: &str, both: f64| {
            format!(
                "{{\"operator\":\"gla\",\"engine\":\"mma\",\"shape\":[1,2,3,4,5],\"device\":\"{device}\",\"forward_ms\":1.5,\
                 \"both_ms\":{both},\"errors\":{{\"o\":2e-3}}}}\n"
            )
        };
        let table = engines(&format!("{TEXT}{}{}", mma("G", 2.5), mma("J", 9.0))).unwrap();
        // Another device's, and other shapes', are not comparable.
        assert_eq!(table.rows.len(), 1);
        let line = table.rows[0].join("|");
        assert_eq!(line, "gla|1, 2, 3, 4, 5|1.500|1.000|1.50|2.500|2.000|1.25|–|1.00|2.0e-3 (o)|G");
        assert_eq!(table.rows[0].len(), table.columns.len());
    }

    #[test]
    fn steps_are_a_table_of_their_own() {
        let table = steps(TEXT).unwrap();
        assert_eq!(table.rows.len(), 1);
        assert_eq!(table.rows[0].join("|"), "gla|1, 1, 3, 4, 5|0.2000|0.1000|0.0800|1.25|1.0e-3 (o)|G");
        assert_eq!(table.rows[0].len(), table.columns.len());
    }

    #[test]
    fn a_line_that_is_no_row_is_named() {
        let message = operators("{\"operator\":\"gla\"}").unwrap_err();
        assert!(message.starts_with("line 1: ") && message.contains("engine"), "{message}");
    }
}
