//! Curves of one or more runs, as SVG or PNG.

use std::sync::OnceLock;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;

use super::History;
use crate::TrainError;

/// Width and height of a plot in pixels.
const SIZE: (u32, u32) = (1000, 900);

/// Colours that people with colour-blindness tell apart (Okabe and Ito 2008).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];

/// A point of a curve.
type Point = (f64, f64);

struct Curve {
    name: String,
    colour: RGBColor,
    points: Vec<Point>,
    /// Held-out figures: marked, and not smoothed.
    marked: bool,
}

/// Loss above, tokens in a second below, over the tokens seen, as the text of an SVG file. Training losses are smoothed by
/// an exponential mean over about a fiftieth of the curve; held-out losses are marked with points.
///
/// # Errors
/// Runs without any training line.
pub fn plot(runs: &[History]) -> Result<String, TrainError> {
    let mut svg = String::new();
    draw(SVGBackend::with_string(&mut svg, SIZE).into_drawing_area(), &Curves::of(runs)?)?;
    Ok(svg)
}

/// The same in pixels, as the bytes of a PNG file.
///
/// # Errors
/// Runs without any training line.
pub fn plot_png(runs: &[History]) -> Result<Vec<u8>, TrainError> {
    let mut pixels = vec![0; 3 * (SIZE.0 * SIZE.1) as usize];
    draw(BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area(), &Curves::of(runs)?)?;
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, SIZE.0, SIZE.1);
    encoder.set_color(png::ColorType::Rgb);
    let written = encoder.write_header().and_then(|mut writer| writer.write_image_data(&pixels));
    written.map_err(|error| TrainError::Execution(format!("the plot: {error}")))?;
    Ok(file)
}

/// What is drawn.
struct Curves {
    losses: Vec<Curve>,
    rates: Vec<Curve>,
}

impl Curves {
    fn of(runs: &[History]) -> Result<Curves, TrainError> {
        let (mut losses, mut rates) = (Vec::new(), Vec::new());
        for (at, run) in runs.iter().enumerate() {
            let colour = COLOURS[at % COLOURS.len()];
            let training = run.training.iter().filter(|point| point.loss.is_finite());
            let points: Vec<Point> = training.map(|point| (point.tokens, point.loss)).collect();
            losses.push(Curve { name: run.name(), colour, points: smooth(&points), marked: false });
            let points: Vec<Point> = run.validation.iter().map(|point| (point.tokens, point.loss)).collect();
            if !points.is_empty() {
                losses.push(Curve { name: format!("{}, held out", run.name()), colour, points, marked: true });
            }
            let points = run.training.iter().map(|point| (point.tokens, point.tokens_per_s)).collect();
            rates.push(Curve { name: run.name(), colour, points, marked: false });
        }
        if losses.iter().all(|curve| curve.points.is_empty()) {
            return Err(TrainError::Execution("none of the runs has written a training line yet".to_string()));
        }
        Ok(Curves { losses, rates })
    }
}

fn draw<B: DrawingBackend>(area: DrawingArea<B, Shift>, curves: &Curves) -> Result<(), TrainError>
where
    B::ErrorType: 'static,
{
    // The font that letters are measured with, and drawn with in pixels, comes along: a machine may have none.
    static FONT: OnceLock<bool> = OnceLock::new();
    let font = || register_font("sans-serif", FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT).is_ok();
    FONT.get_or_init(font);
    let all = || -> Result<(), Box<dyn std::error::Error>> {
        area.fill(&WHITE)?;
        let (above, below) = area.split_vertically(SIZE.1 * 2 / 3);
        chart(&above, "loss (nats per token)", &curves.losses, false, true)?;
        chart(&below, "tokens per second", &curves.rates, true, false)?;
        area.present()?;
        Ok(())
    };
    all().map_err(|error| TrainError::Execution(format!("the plot: {error}")))
}

fn chart<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    title: &str,
    curves: &[Curve],
    from_zero: bool,
    legend: bool,
) -> Result<(), Box<dyn std::error::Error>>
where
    B::ErrorType: 'static,
{
    let all = || curves.iter().flat_map(|curve| &curve.points);
    let most = all().map(|point| point.0).fold(1.0, f64::max);
    // The first losses of a run would press the rest flat: the highest hundredth is cut off.
    let mut heights: Vec<f64> = all().map(|point| point.1).filter(|y| y.is_finite()).collect();
    heights.sort_by(f64::total_cmp);
    let high = heights.get(heights.len().saturating_sub(1) * 99 / 100).copied().unwrap_or(1.0);
    let low = if from_zero { 0.0 } else { heights.first().copied().unwrap_or(0.0) };
    let room = ((high - low) * 0.05).max(1e-3 * high.abs()).max(1e-9);
    let bottom = if from_zero { 0.0 } else { low - room };
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 20))
        .margin(15)
        .x_label_area_size(45)
        .y_label_area_size(70)
        .build_cartesian_2d(0.0..most, bottom..high + room)?;
    let count = |x: &f64| crate::plan::count(*x);
    let decimals = |y: &f64| if from_zero { crate::plan::count(*y) } else { format!("{y:.2}") };
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(225, 225, 225))
        .x_desc("tokens")
        .x_label_formatter(&count)
        .y_label_formatter(&decimals)
        .label_style(("sans-serif", 14))
        .draw()?;
    for curve in curves {
        let colour = curve.colour;
        let width = if curve.marked { 1 } else { 2 };
        let inside = curve.points.iter().copied().filter(|point| point.1 <= high + room);
        let drawn = chart.draw_series(LineSeries::new(inside.clone(), colour.stroke_width(width)))?;
        let marked = curve.marked;
        drawn.label(&curve.name).legend(move |(x, y)| {
            let line = PathElement::new(vec![(x, y), (x + 20, y)], colour.stroke_width(width));
            let point = Circle::new((x + 10, y), if marked { 4 } else { 0 }, colour.filled());
            EmptyElement::at((0, 0)) + line + point
        });
        if curve.marked {
            chart.draw_series(inside.map(|point| Circle::new(point, 4, colour.filled())))?;
        }
    }
    if legend {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.85))
            .border_style(RGBColor(200, 200, 200))
            .label_font(("sans-serif", 15))
            .draw()?;
    }
    Ok(())
}

/// An exponential mean over about a fiftieth of the points, without a bias at the beginning.
fn smooth(points: &[Point]) -> Vec<Point> {
    let keep = 1.0 - 1.0 / (points.len() as f64 / 50.0).max(1.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let mean = |(x, y): &Point| {
        sum = keep * sum + y;
        weight = keep * weight + 1.0;
        (*x, sum / weight)
    };
    points.iter().map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{TrainPoint, ValidationPoint};

    #[test]
    fn smoothing_keeps_short_curves_and_averages_long_ones() {
        let short: Vec<Point> = (0..40).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        assert_eq!(smooth(&short), short);
        let long: Vec<Point> = (0..5000).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        let smoothed = smooth(&long);
        assert!(smoothed[500..].iter().all(|(_, y)| (y - 0.5).abs() < 0.01));
    }

    #[test]
    fn every_run_has_its_curves() {
        let point = |step: u64| TrainPoint { step, tokens: step as f64, loss: 5.0 / step as f64, tokens_per_s: 100.0 };
        let held_out = ValidationPoint { step: 9, tokens: 9.0, loss: 1.0, bits_per_byte: None, accuracy: None };
        let run = |name: &str, validation: Vec<ValidationPoint>| History {
            folder: name.into(),
            training: (1..10).map(point).collect(),
            validation,
            ..History::default()
        };
        let svg = plot(&[run("runs/one", vec![held_out]), run("runs/two", vec![])]).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        // Training, held out and rate of the first, training and rate of the second.
        assert!(svg.matches("<polyline").count() >= 5);
        for name in ["one", "one, held out", "two"] {
            assert!(svg.contains(&format!("\n{name}\n")), "{name}");
        }
        assert!(plot(&[History::default()]).is_err());
    }

    /// The picture in pixels has what the drawing has: each run's line in its colour, grey letters, white elsewhere.
    #[test]
    fn pixels_show_the_same() {
        let point = |step: u64| TrainPoint { step, tokens: step as f64, loss: 5.0 / step as f64, tokens_per_s: 100.0 };
        let run = |name: &str, from: u64| History {
            folder: name.into(),
            training: (from..from + 9).map(point).collect(),
            ..History::default()
        };
        let file = plot_png(&[run("one", 1), run("two", 3)]).unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((info.width, info.height, info.color_type), (SIZE.0, SIZE.1, png::ColorType::Rgb));
        let count = |colour: (u8, u8, u8)| {
            pixels.chunks_exact(3).filter(|pixel| *pixel == [colour.0, colour.1, colour.2]).count()
        };
        let (white, one, two, three) =
            (count((255, 255, 255)), count(COLOURS[0].rgb()), count(COLOURS[1].rgb()), count(COLOURS[2].rgb()));
        assert!(one > 500 && two > 500, "{one} and {two} pixels of the two lines");
        assert_eq!(three, 0, "there is no third run");
        assert!(white > pixels.len() / 3 * 8 / 10);
        // The title is at the top, and made of letters: some dark pixels, not a box of them.
        let top = &pixels[..3 * (SIZE.0 * 45) as usize];
        let dark = top.chunks_exact(3).filter(|pixel| pixel.iter().all(|part| *part < 128)).count();
        assert!((100..4000).contains(&dark), "{dark} dark pixels in the title");
    }
}
