//! Columns of a result's table as lines over another, both axes logarithmic.

use std::io;
use std::path::Path;

use plotters::prelude::*;
use plotters::style::register_font;

use crate::BenchResult;

/// One line: its name, and its points.
type Series = (String, Vec<(f64, f64)>);

const COLOURS: [RGBColor; 6] = [
    RGBColor(31, 119, 180),
    RGBColor(255, 127, 14),
    RGBColor(44, 160, 44),
    RGBColor(214, 39, 40),
    RGBColor(148, 103, 189),
    RGBColor(140, 86, 75),
];

/// Draws the columns `ys` of `result` over the column `x` into an SVG file. Cells that are no numbers are left out.
///
/// # Errors
/// A column that is not there, or has no number above 0; a file that cannot be written.
pub fn plot(result: &BenchResult, x: &str, ys: &[String], file: &Path) -> io::Result<()> {
    let table = result.table.as_ref().ok_or_else(|| io::Error::other("the result has no table"))?;
    let column = |name: &str| {
        let found = table.columns.iter().position(|column| column == name);
        found.ok_or_else(|| io::Error::other(format!("no column {name}; there are {}", table.columns.join(", "))))
    };
    let x_at = column(x)?;
    let mut series: Vec<Series> = Vec::new();
    for name in ys {
        let y_at = column(name)?;
        let point = |row: &Vec<String>| Some((row[x_at].parse().ok()?, row[y_at].parse().ok()?));
        let points: Vec<(f64, f64)> =
            table.rows.iter().filter_map(point).filter(|(x, y)| *x > 0.0 && *y > 0.0).collect();
        if points.is_empty() {
            return Err(io::Error::other(format!("the column {name} has no number above 0")));
        }
        series.push((name.clone(), points));
    }
    let range = |of: fn(&(f64, f64)) -> f64| {
        let all = || series.iter().flat_map(|(_, points)| points).map(of);
        all().fold(f64::INFINITY, f64::min)..all().fold(0.0, f64::max)
    };
    let (xs, ys) = (range(|point| point.0), range(|point| point.1));
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let mut text = String::new();
    draw(&mut text, result, x, &series, xs.start..xs.end * 1.05, ys.start * 0.8..ys.end * 1.25)
        .map_err(|error| io::Error::other(error.to_string()))?;
    std::fs::write(file, text)
}

fn draw(
    text: &mut String,
    result: &BenchResult,
    x: &str,
    series: &[Series],
    xs: std::ops::Range<f64>,
    ys: std::ops::Range<f64>,
) -> Result<(), Box<dyn std::error::Error>> {
    // Labels are measured with a font that comes along; it is the same each time.
    let font = register_font("sans-serif", FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT);
    font.map_err(|_| "the font cannot be read")?;
    let root = SVGBackend::with_string(text, (900, 520)).into_drawing_area();
    root.fill(&WHITE)?;
    let caption = format!("{} ({})", result.title, result.machine);
    let mut chart = ChartBuilder::on(&root)
        .caption(caption, ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(64)
        .build_cartesian_2d(xs.log_scale(), ys.log_scale())?;
    chart.configure_mesh().x_desc(x).y_desc("milliseconds").light_line_style(TRANSPARENT).draw()?;
    for ((name, points), colour) in series.iter().zip(COLOURS.iter().cycle()) {
        let style = colour.stroke_width(2);
        chart
            .draw_series(LineSeries::new(points.iter().copied(), style).point_size(3))?
            .label(name)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.9))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Table;

    #[test]
    fn every_column_becomes_a_line_and_a_missing_one_an_error() {
        let row = |cells: [&str; 3]| cells.map(str::to_string).to_vec();
        let result = BenchResult {
            title: "Retention".into(),
            machine: "a GPU".into(),
            commit: "0".into(),
            command: "none".into(),
            note: String::new(),
            table: Some(Table {
                columns: row(["T", "ours", "theirs"]),
                rows: vec![row(["128", "0.1", "0.2"]), row(["256", "0.2", "–"]), row(["512", "0.4", "0.8"])],
            }),
            output: String::new(),
        };
        let folder = std::env::temp_dir().join(format!("burn-fla-plot-{}", std::process::id()));
        let file = folder.join("plot.svg");
        plot(&result, "T", &["ours".into(), "theirs".into()], &file).unwrap();
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        for (name, colour) in [("ours", "#1F77B4"), ("theirs", "#FF7F0E")] {
            assert_eq!(text.matches(&format!("\n{name}\n")).count(), 1, "{name} in the legend");
            // The line, and a piece of it in the legend; those of the axes have other colours.
            let tags = text.split("<polyline").skip(1).filter_map(|rest| rest.split('>').next());
            assert_eq!(tags.filter(|tag| tag.contains(colour)).count(), 2, "{name}");
        }
        // Three points of one line, two of the other.
        assert_eq!(text.matches("<circle").count(), 5);
        let missing = plot(&result, "T", &["nothing".into()], &file).unwrap_err().to_string();
        assert!(missing.contains("no column nothing") && missing.contains("theirs"), "{missing}");
    }
}
