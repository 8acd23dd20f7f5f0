//! Named problems of the decayed recurrences, over every edge that a kernel has. The suites run over this list, and what
//! times an operator belongs here too, so that what is timed is checked.

/// One problem of [`simple_gla`](crate::simple_gla()) or [`gla`](crate::gla()).
#[derive(Clone, Debug)]
pub struct RecurrenceCase {
    /// What it is for.
    pub name: &'static str,
    /// Rows of the batch.
    pub batch: usize,
    /// Tokens a row.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Key channels a head.
    pub keys: usize,
    /// Value channels a head.
    pub values: usize,
    /// Log decays are drawn from this range, evenly.
    pub decay: (f64, f64),
    /// Offsets of packed sequences, where the row is packed.
    pub packed: Option<&'static [usize]>,
    /// Whether there is an initial state.
    pub initial: bool,
}

impl RecurrenceCase {
    const BASE: Self = Self {
        name: "",
        batch: 2,
        tokens: 64,
        heads: 2,
        keys: 16,
        values: 16,
        decay: (-0.5, 0.0),
        packed: None,
        initial: true,
    };

    /// How many sequences there are.
    pub fn sequences(&self) -> usize {
        self.packed.map_or(self.batch, |offsets| offsets.len() - 1)
    }
}

/// Problems small enough for a software device, over every edge that a kernel has.
pub fn recurrence_cases() -> Vec<RecurrenceCase> {
    let base = RecurrenceCase::BASE;
    vec![
        RecurrenceCase { name: "one token", tokens: 1, ..base },
        RecurrenceCase { name: "one less than a chunk", tokens: 63, ..base },
        RecurrenceCase { name: "a chunk", ..base },
        RecurrenceCase { name: "one more than a chunk", tokens: 65, initial: false, ..base },
        RecurrenceCase { name: "two chunks and a bit", tokens: 131, batch: 1, ..base },
        RecurrenceCase { name: "one head of odd size", tokens: 70, batch: 1, heads: 1, keys: 5, values: 7, ..base },
        RecurrenceCase { name: "wide and odd", tokens: 67, batch: 1, keys: 100, values: 72, ..base },
        RecurrenceCase { name: "wider than a cube", tokens: 9, batch: 1, heads: 1, keys: 48, values: 300, ..base },
        RecurrenceCase { name: "many keys", tokens: 33, batch: 1, heads: 1, keys: 256, values: 24, ..base },
        RecurrenceCase { name: "no decay", tokens: 80, decay: (0.0, 0.0), ..base },
        RecurrenceCase { name: "fast decay", tokens: 80, decay: (-30.0, 0.0), ..base },
        RecurrenceCase { name: "total decay", tokens: 80, decay: (-30.0, -29.0), ..base },
        RecurrenceCase {
            name: "packed, with empty and one-token sequences",
            tokens: 140,
            batch: 1,
            packed: Some(&[0, 64, 64, 65, 73, 140]),
            ..base
        },
        RecurrenceCase { name: "packed, one token each", tokens: 3, batch: 1, packed: Some(&[0, 1, 2, 3]), ..base },
    ]
}
