//! Rows of one kind, shown as a table, as JSON or as YAML; once, or each change as it comes.
//!
//! Names in them come from the cluster's objects: nothing is printed that a terminal would obey.

use std::{collections::BTreeMap, fmt::Write as _};

use serde_json::{Value, json};

use crate::admin::{printable, printable_json};

/// How rows are shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// Columns for people
    #[default]
    Table,
    /// More columns
    Wide,
    /// All that is known, as JSON
    Json,
    /// All that is known, as YAML
    Yaml,
}

/// One column.
#[derive(Clone, Copy, Debug)]
pub(super) struct Column {
    name: &'static str,
    /// Shown by [`Format::Wide`] only.
    wide: bool,
    /// Changes by itself: no reason to show a row again.
    volatile: bool,
}

impl Column {
    /// A column of every table.
    pub(super) const fn new(name: &'static str) -> Self {
        Self { name, wide: false, volatile: false }
    }

    /// A column of wide tables.
    pub(super) const fn wide(name: &'static str) -> Self {
        Self { name, wide: true, volatile: false }
    }

    /// A column whose changes do not count.
    pub(super) const fn volatile(name: &'static str) -> Self {
        Self { name, wide: false, volatile: true }
    }
}

/// One row.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    /// What it is the row of: the same before and after a change.
    pub(super) key: String,
    /// One for each column.
    pub(super) cells: Vec<String>,
    /// All that is known.
    pub(super) object: Value,
}

/// Rows of one kind, sorted.
#[derive(Clone, Debug)]
pub(super) struct Sheet {
    /// Its columns.
    pub(super) columns: &'static [Column],
    /// Its rows.
    pub(super) rows: Vec<Row>,
}

impl Sheet {
    /// A row that continues the one before it has no object of its own.
    fn objects(&self) -> Value {
        self.rows.iter().map(|row| row.object.clone()).filter(|object| !object.is_null()).collect()
    }

    /// All rows.
    pub(super) fn show(&self, format: Format) -> String {
        match format {
            Format::Table | Format::Wide => {
                let mut table = Table::new(self.columns, format, false);
                table.fit(&self.rows, "");
                let mut text = table.header();
                self.rows.iter().for_each(|row| text += &table.line(row, ""));
                text
            }
            Format::Json => json_text(&self.objects(), true) + "\n",
            Format::Yaml => yaml(&self.objects()),
        }
    }
}

/// Shows each change of a sheet as it comes, as `kubectl get --watch --output-watch-events` does.
#[derive(Debug)]
pub(super) struct Watch {
    format: Format,
    known: Option<BTreeMap<String, Row>>,
    table: Option<Table>,
}

impl Watch {
    /// Nothing has been seen yet.
    pub(super) fn new(format: Format) -> Self {
        Self { format, known: None, table: None }
    }

    /// What is new since the last time; the first time, everything.
    pub(super) fn next(&mut self, sheet: &Sheet) -> String {
        let now: BTreeMap<String, Row> = sheet.rows.iter().map(|row| (row.key.clone(), row.clone())).collect();
        let first = self.known.is_none();
        let before = self.known.take().unwrap_or_default();
        let same = |a: &Row, b: &Row| {
            let cells = a.cells.iter().zip(&b.cells).zip(sheet.columns);
            let shown = cells.into_iter().filter(|(_, column)| !column.volatile).all(|((a, b), _)| a == b);
            match self.format {
                Format::Table | Format::Wide => shown,
                Format::Json | Format::Yaml => a.object == b.object,
            }
        };
        let mut events: Vec<(&str, &Row)> = Vec::new();
        for row in &sheet.rows {
            match before.get(&row.key) {
                None => events.push(("ADDED", row)),
                Some(old) if !same(old, row) => events.push(("MODIFIED", row)),
                Some(_) => {}
            }
        }
        events.extend(before.values().filter(|row| !now.contains_key(&row.key)).map(|row| ("DELETED", row)));
        if matches!(self.format, Format::Json | Format::Yaml) {
            events.retain(|(_, row)| !row.object.is_null());
        }
        let mut text = String::new();
        match self.format {
            Format::Table | Format::Wide => {
                let table = self.table.get_or_insert_with(|| Table::new(sheet.columns, self.format, true));
                if first {
                    table.fit(&sheet.rows, "MODIFIED");
                    text += &table.header();
                }
                events.iter().for_each(|(event, row)| text += &table.line(row, event));
            }
            Format::Json => {
                for (event, row) in events {
                    text += &json_text(&json!({"type": event, "object": row.object}), false);
                    text.push('\n');
                }
            }
            Format::Yaml => {
                for (event, row) in events {
                    text += "---\n";
                    text += &yaml(&json!({"type": event, "object": row.object}));
                }
            }
        }
        self.known = Some(now);
        text
    }
}

/// Columns with their widths.
#[derive(Debug)]
struct Table {
    columns: &'static [Column],
    wide: bool,
    events: bool,
    widths: Vec<usize>,
}

impl Table {
    fn new(columns: &'static [Column], format: Format, events: bool) -> Self {
        Self { columns, wide: format == Format::Wide, events, widths: Vec::new() }
    }

    fn cells<'a>(&self, cells: impl Iterator<Item = &'a str>, event: &'a str) -> Vec<String> {
        let columns = self.columns.iter().zip(cells).filter(|(column, _)| self.wide || !column.wide);
        let cells =
            columns.map(|(_, cell)| if cell.is_empty() { "-".to_owned() } else { printable(cell).into_owned() });
        self.events.then(|| event.to_owned()).into_iter().chain(cells).collect()
    }

    fn names(&self) -> Vec<String> {
        self.cells(self.columns.iter().map(|column| column.name), "EVENT")
    }

    fn fit(&mut self, rows: &[Row], event: &str) {
        self.widths = self.names().iter().map(|name| name.chars().count()).collect();
        for row in rows {
            let cells = self.cells(row.cells.iter().map(String::as_str), event);
            for (width, cell) in self.widths.iter_mut().zip(&cells) {
                *width = (*width).max(cell.chars().count());
            }
        }
        if let Some(first) = self.widths.first_mut() {
            *first = (*first).max(event.len());
        }
    }

    fn header(&self) -> String {
        self.padded(&self.names())
    }

    fn line(&self, row: &Row, event: &str) -> String {
        self.padded(&self.cells(row.cells.iter().map(String::as_str), event))
    }

    fn padded(&self, cells: &[String]) -> String {
        let mut line = String::new();
        for (cell, width) in cells.iter().zip(&self.widths) {
            let gap = width.saturating_sub(cell.chars().count()) + 3;
            // Writing to a string cannot fail.
            let _ = write!(line, "{cell}{:gap$}", "");
        }
        line.truncate(line.trim_end().len());
        line.push('\n');
        line
    }
}

fn json_text(value: &Value, pretty: bool) -> String {
    let text = if pretty { serde_json::to_string_pretty(value) } else { serde_json::to_string(value) };
    printable_json(&text.unwrap_or_default()).into_owned()
}

/// `value` as a YAML document in block style. Texts that could be taken for something else are in double quotes, in
/// which YAML reads what JSON writes.
pub(super) fn yaml(value: &Value) -> String {
    let mut text = String::new();
    yaml_into(&mut text, value, 0, false);
    text
}

fn yaml_into(text: &mut String, value: &Value, depth: usize, inline: bool) {
    let indent = |text: &mut String, first: bool| {
        if !(first && inline) {
            text.extend(std::iter::repeat_n(' ', depth * 2));
        }
    };
    match value {
        Value::Array(items) if !items.is_empty() => {
            for (number, item) in items.iter().enumerate() {
                indent(text, number == 0);
                text.push_str("- ");
                yaml_into(text, item, depth + 1, true);
            }
        }
        Value::Object(fields) if !fields.is_empty() => {
            for (number, (name, field)) in fields.iter().enumerate() {
                indent(text, number == 0);
                text.push_str(&yaml_scalar(name));
                text.push(':');
                let nested = match field {
                    Value::Array(items) => !items.is_empty(),
                    Value::Object(fields) => !fields.is_empty(),
                    _ => false,
                };
                text.push(if nested { '\n' } else { ' ' });
                yaml_into(text, field, depth + 1, false);
            }
        }
        Value::Array(_) => text.push_str("[]\n"),
        Value::Object(_) => text.push_str("{}\n"),
        Value::String(string) => {
            text.push_str(&yaml_scalar(string));
            text.push('\n');
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {
            text.push_str(&value.to_string());
            text.push('\n');
        }
    }
}

fn yaml_scalar(text: &str) -> String {
    let plain = text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/'))
        && !["y", "n", "yes", "no", "on", "off", "true", "false", "null"].contains(&&*text.to_ascii_lowercase());
    match plain {
        true => text.to_owned(),
        false => json_text(&Value::String(text.to_owned()), false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::yaml::mapping;

    const COLUMNS: &[Column] =
        &[Column::new("NAME"), Column::new("STATE"), Column::volatile("AGE"), Column::wide("WHY")];

    fn row(name: &str, state: &str, age: &str) -> Row {
        let cells = [name, state, age, "because"].map(str::to_owned).to_vec();
        Row { key: name.to_owned(), cells, object: json!({"name": name, "state": state}) }
    }

    fn sheet(rows: Vec<Row>) -> Sheet {
        Sheet { columns: COLUMNS, rows }
    }

    #[test]
    fn columns_are_aligned_and_nothing_commands_the_terminal() {
        let sheet = sheet(vec![row("a", "", "1s"), row("b\u{1b}[31m", "on", "2s")]);
        let lines = ["NAME          STATE   AGE", "a             -       1s", "b\\u{1b}[31m   on      2s", ""];
        assert_eq!(sheet.show(Format::Table), lines.join("\n"));
        assert!(sheet.show(Format::Wide).lines().all(|line| line.ends_with("WHY") || line.ends_with("because")));
        assert!(!sheet.show(Format::Json).contains('\u{1b}') && !sheet.show(Format::Yaml).contains('\u{1b}'));
    }

    #[test]
    fn watching_shows_what_changed_and_nothing_else() {
        let mut watch = Watch::new(Format::Table);
        let first = watch.next(&sheet(vec![row("a", "on", "1s"), row("b", "on", "1s")]));
        assert_eq!(first.lines().count(), 3, "{first}");
        assert_eq!(watch.next(&sheet(vec![row("a", "on", "9s"), row("b", "on", "9s")])), "", "age is no change");
        let text = watch.next(&sheet(vec![row("a", "off", "9s"), row("c", "on", "1s")]));
        let events: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(events, [["MODIFIED", "a", "off", "9s"], ["ADDED", "c", "on", "1s"], ["DELETED", "b", "on", "9s"]]);
        let mut watch = Watch::new(Format::Json);
        watch.next(&sheet(vec![row("a", "on", "1s")]));
        let line = watch.next(&sheet(vec![]));
        let event: Value = serde_json::from_str(&line).expect("one line of JSON");
        assert_eq!(event, json!({"type": "DELETED", "object": {"name": "a", "state": "on"}}));
    }

    #[test]
    fn yaml_reads_as_what_was_written() {
        let value = json!({
            "plain": "test/nginx", "yes": "no", "number": 5, "text": "5", "null": null, "empty": [], "none": {},
            "odd: name": "a: b # c\n\u{85}", "list": [{"a": 1, "b": [1, [2, 3]]}, [], "x"], "deep": {"er": {"est": true}},
        });
        let text = yaml(&value);
        let read = mapping(&text).expect("one mapping");
        // The reader of settings leaves out what is null.
        assert_eq!(read.len() + 1, value.as_object().map_or(0, |fields| fields.len()));
        assert!(read.contains(&("odd: name".to_owned(), Some("a: b # c\n\u{85}".to_owned()))), "{read:?}");
        for line in [
            "plain: test/nginx\n",
            "\"yes\": \"no\"\n",
            "text: \"5\"\n",
            "empty: []\n",
            "none: {}\n",
            "\"odd: name\": \"a: b # c\\n\\u0085\"\n",
            "list:\n  - a: 1\n    b:\n      - 1\n      - - 2\n        - 3\n  - []\n  - x\n",
            "deep:\n  er:\n    est: true\n",
        ] {
            assert!(text.contains(line), "{line} in\n{text}");
        }
    }
}
